"""Prints the config of every class of a decoder in transformers at its defaults, as JSON by model type.

Runs in an environment with transformers and without rpac. The names of the classes that write text are read from the source
of transformers' own table, because importing that needs PyTorch.
"""

from __future__ import annotations

import ast
import contextlib
import json
import sys
from pathlib import Path

TABLES = (
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
)


def model_types(source: str) -> list[str]:
    """The model types in the tables."""
    found = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id in TABLES:
            pairs = [one for one in ast.walk(node.value) if isinstance(one, ast.Tuple) and len(one.elts) == 2]
            found |= {one.elts[0].value for one in pairs if isinstance(one.elts[0], ast.Constant)}
    return sorted(found)


def main() -> None:
    with contextlib.redirect_stdout(sys.stderr):
        import transformers
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        folder = Path(transformers.__file__).parent
        configs: dict[str, object] = {}
        for name in model_types((folder / "models" / "auto" / "modeling_auto.py").read_text()):
            try:
                configs[name] = CONFIG_MAPPING[name]().to_dict()
            except Exception as error:
                configs[name] = f"{type(error).__name__}: its class has no defaults"
    print(json.dumps(configs, default=str))


if __name__ == "__main__":
    main()
