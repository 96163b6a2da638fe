"""A bundle in a served vLLM: an extension of its workers, which vLLM makes in processes of its own.

    vllm serve MODEL --worker-extension-cls rpac.adapters.tpu_inference.worker.WorkerExtension \\
      --additional-config '{"rpac_bundle": "build/llama3-8b.rpac"}' ...
"""

from __future__ import annotations

from typing import Any, Final

from rpac.adapters._install import Installation
from rpac.adapters.tpu_inference.install import install
from rpac.engine import load_layers
from rpac.errors import TargetError

BUNDLE: Final = "rpac_bundle"
ALLOW_COMPILE: Final = "rpac_allow_compile"
ANY_VERSION: Final = "rpac_any_version"


class WorkerExtension:
    """What vLLM adds to the bases of its worker class. It calls the method between the start of the devices and the model's."""

    vllm_config: Any  # the worker's own
    rpac_installation: Installation

    def init_worker_extension(self) -> None:
        """Loads the bundle that the worker's `additional_config` names as `rpac_bundle`, with all its kinds of layers, and
        installs it. `rpac_allow_compile` and `rpac_any_version` are those arguments of `rpac.load` and `install`.

        Raises TargetError where it names none, and as `rpac.load` and `install` do: then the worker does not start.
        """
        config = self.vllm_config.additional_config or {}
        if not config.get(BUNDLE):
            raise TargetError(
                f"additional_config has no {BUNDLE}; must name a bundle; start vLLM with "
                f'--additional-config \'{{"{BUNDLE}": "build/NAME.rpac"}}\''
            )
        engines = load_layers(config[BUNDLE], allow_compile=bool(config.get(ALLOW_COMPILE, False)))
        self.rpac_installation = install(engines, any_version=bool(config.get(ANY_VERSION, False)))
