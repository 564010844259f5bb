"""Warnings of other packages that no change of ours can avoid. Anything else fails its test."""

from __future__ import annotations

#: A filter of `warnings`, and the reason.
EXPECTED_WARNINGS: list[tuple[str, str]] = [
    ("ignore:`isinstance\\(treespec, LeafSpec\\)` is deprecated", "lightning 2.6.6 asks so; torch 2.15 renamed it"),
    ("ignore:The '(train|val|test)_dataloader' does not have many workers", "no worker process pays for tiny data"),
    (r"ignore:\s.* was deprecated in v4:DeprecationWarning", "LightningCLI calls what jsonargparse 4.49 deprecated"),
    (r"ignore:\s*By default only one Jsonargparse:DeprecationWarning", "comes along with the one above"),
    ("ignore:.*invalid escape sequence", "in POT 0.9.7, told at the first import where the installer compiled nothing"),
    ("ignore:`torch.jit.* is deprecated", "torch 2.10 and 2.11 say so of TorchScript, which users have and tests take"),
    ("ignore:Guards may run slower on Python 3.13.0", "torch says so of that one release, when it compiles"),
    ("ignore:The .grad attribute of a Tensor that is not a leaf", "Dynamo hides it, unless warnings are errors"),
    ("ignore:`training_step` returned `None`", "Lightning tells users of such steps, which are tested on purpose"),
]
