"""Who vouches for a bundle: signed statements beside it, and the policy that says which of them must hold.

`NAME.rpac.intoto.jsonl` holds one DSSE envelope a line, each with an in-toto statement v1 about the bundle's manifest and all of
its blobs. Signing and verifying need the packages of `rpac[trust]`; without a policy nothing here is imported.
"""

from rpac.trust.policy import Policy, load_policy
from rpac.trust.verify import Attestation, Verdict, approved, verdict

__all__ = ["Attestation", "Policy", "Verdict", "approved", "load_policy", "verdict"]
