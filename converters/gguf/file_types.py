"""The mixtures of llama-quantize as a table: which type each file type uses for each tensor of a decoder.

The rules are those of llama.cpp's src/llama-quant.cpp (llama_tensor_get_type).
"""

from __future__ import annotations

from dataclasses import dataclass

from converters.gguf.places import (
    Rule,
    always,
    eight_experts,
    first_eighth,
    first_eighth_or_more_of_eight,
    first_eighth_with_imatrix,
    first_eighth_without_imatrix,
    first_four,
    first_sixteenth,
    first_two,
    four_heads_or_experts,
    four_heads_per_kv,
    middle,
    more_bits,
    without_imatrix,
)

_V_AND_K = (("attn_v", "q8_0"), ("attn_k", "q8_0"))
_V_K_AND_OUTPUT = (*_V_AND_K, ("attn_output", "q5_k"))
_K_AND_OUTPUT = (("attn_k", "q4_k"), ("attn_output", "q5_k"))


@dataclass(frozen=True)
class Mixture:
    """What `--quant NAME` means: general.file_type, the type of most tensors, and the exceptions by role.

    `output` is the type of the output layer, `embedding` that of an embedding which is not used as one,
    `flat` that of tensors of two dimensions, where these are others. `wants` names a type that this mixture
    uses for no tensor without importance data, beside those of which that is always so. `eight` is the type
    of attention's tensors by role in models of eight experts, whatever the exceptions say. `counted` says
    that ffn_down goes by how many there were and not by its layer, also where a layer has several.
    """

    file_type: int
    default: str
    attn_q: Rule = ()
    attn_k: Rule = ()
    attn_v: Rule = ()
    attn_output: Rule = ()
    ffn_gate: Rule = ()
    ffn_up: Rule = ()
    ffn_down: Rule = ()
    output: str = "q6_k"
    embedding: str = ""
    flat: str = ""
    raises_wide: bool = True  # whether attn_v gets q5_k for q3_k and q4_k in a shape of small attn_v
    wants: str = ""
    eight: tuple[tuple[str, str], ...] = _V_AND_K
    counted: bool = False

    def rule(self, role: str) -> Rule:
        """The exceptions of a role."""
        eight = tuple((eight_experts, kind) for named, kind in self.eight if named == role)
        return eight + getattr(self, role)  # type: ignore[no-any-return]


_GROUPED: Rule = ((four_heads_per_kv, "q4_k"),)
_SMALL_V: Rule = ((four_heads_or_experts, "q4_k"), (always, "q2_k"))
_LARGE_V: Rule = ((four_heads_or_experts, "q4_k"), (always, "iq3_s"))
_FOUR_BIT_V: Rule = ((four_heads_per_kv, "q5_k"),)
_FOUR_BIT_DOWN: Rule = ((first_eighth_without_imatrix, "q5_k"),)
_XXS: Rule = ((always, "iq3_xxs"),)

MIXTURES: dict[str, Mixture] = {
    "f32": Mixture(0, "f32"),
    "f16": Mixture(1, "f16"),
    "bf16": Mixture(32, "bf16"),
    "q8_0": Mixture(7, "q8_0"),
    "q4_0": Mixture(2, "q4_0", ffn_down=((first_eighth_with_imatrix, "q4_1"),)),
    "q4_1": Mixture(3, "q4_1"),
    "q5_0": Mixture(8, "q5_0", ffn_down=((first_eighth_with_imatrix, "q5_1"),)),
    "q5_1": Mixture(9, "q5_1"),
    "q2_k": Mixture(
        10,
        "q2_k",
        attn_v=((four_heads_per_kv, "q4_k"), (always, "q3_k")),
        ffn_down=((always, "q3_k"),),
        attn_output=((always, "q3_k"),),
        eight=_V_K_AND_OUTPUT,
    ),
    "q2_k_s": Mixture(
        21,
        "q2_k",
        attn_v=_GROUPED,
        ffn_down=((first_eighth, "q4_k"),),
        wants="q2_k",
    ),
    "q3_k_s": Mixture(11, "q3_k", eight=_V_K_AND_OUTPUT),
    "q3_k_m": Mixture(
        12,
        "q3_k",
        attn_v=((first_two, "q5_k"), (always, "q4_k")),
        ffn_down=((first_sixteenth, "q5_k"), (always, "q4_k")),
        attn_output=((always, "q4_k"),),
        eight=_V_K_AND_OUTPUT,
    ),
    "q3_k_l": Mixture(
        13,
        "q3_k",
        attn_v=((always, "q5_k"),),
        ffn_down=((always, "q5_k"),),
        attn_output=((always, "q5_k"),),
        eight=(*_V_AND_K, ("attn_output", "q3_k")),
    ),
    "q4_k_s": Mixture(
        14, "q4_k", attn_v=((first_four, "q5_k"),), ffn_down=((first_eighth, "q5_k"),), eight=_V_K_AND_OUTPUT
    ),
    "q4_k_m": Mixture(
        15, "q4_k", attn_v=((more_bits, "q6_k"),), ffn_down=((more_bits, "q6_k"),), eight=_V_K_AND_OUTPUT
    ),
    "q5_k_s": Mixture(16, "q5_k"),
    "q5_k_m": Mixture(17, "q5_k", attn_v=((more_bits, "q6_k"),), ffn_down=((more_bits, "q6_k"),)),
    "q6_k": Mixture(18, "q6_k"),
    "iq4_nl": Mixture(25, "iq4_nl", attn_v=_FOUR_BIT_V, ffn_down=_FOUR_BIT_DOWN, eight=_V_K_AND_OUTPUT),
    "iq4_xs": Mixture(30, "iq4_xs", attn_v=_FOUR_BIT_V, ffn_down=_FOUR_BIT_DOWN, eight=_V_K_AND_OUTPUT),
    "iq3_m": Mixture(
        27,
        "iq3_s",
        attn_v=((always, "q4_k"),),
        attn_output=((always, "q4_k"),),
        ffn_down=((first_eighth_or_more_of_eight, "q4_k"),),
        eight=_V_K_AND_OUTPUT,
    ),
    "iq3_s": Mixture(26, "iq3_s", attn_v=_GROUPED, eight=_V_K_AND_OUTPUT),
    "iq3_xs": Mixture(
        22,
        "iq3_s",
        attn_q=_XXS,
        attn_k=_XXS,
        attn_v=_GROUPED,
        ffn_gate=((middle, "iq3_xxs"),),
        ffn_up=((middle, "iq3_xxs"),),
        eight=_V_K_AND_OUTPUT,
    ),
    "iq3_xxs": Mixture(
        23,
        "iq3_xxs",
        attn_q=((always, "iq2_s"),),
        attn_k=((always, "iq2_s"),),
        attn_v=(*_GROUPED, (without_imatrix, "iq3_s")),
        attn_output=((always, "iq3_s"),),
        ffn_down=((first_eighth_without_imatrix, "q4_k"), (without_imatrix, "q3_k")),
        output="q5_k",
        embedding="iq3_s",
        eight=_V_K_AND_OUTPUT,
    ),
    "iq2_m": Mixture(
        29,
        "iq2_s",
        attn_v=_LARGE_V,
        attn_output=((always, "iq3_s"),),
        ffn_down=((first_eighth, "iq3_s"),),
        output="q5_k",
        embedding="iq3_s",
        raises_wide=False,
        eight=_K_AND_OUTPUT,
        counted=True,
    ),
    "iq2_s": Mixture(
        28,
        "iq2_xs",
        attn_v=_LARGE_V,
        attn_output=((always, "iq3_s"),),
        ffn_down=((first_eighth, "iq3_s"),),
        output="q5_k",
        embedding="iq3_s",
        raises_wide=False,
        eight=_K_AND_OUTPUT,
        counted=True,
    ),
    "iq2_xs": Mixture(
        20,
        "iq2_xs",
        attn_v=_SMALL_V,
        ffn_down=((first_eighth, "q2_k"),),
        output="q5_k",
        embedding="q2_k",
        raises_wide=False,
        eight=_K_AND_OUTPUT,
        counted=True,
    ),
    "iq2_xxs": Mixture(
        19,
        "iq2_xxs",
        attn_v=_SMALL_V,
        ffn_down=((first_eighth, "q2_k"),),
        output="q5_k",
        embedding="q2_k",
        raises_wide=False,
        eight=_K_AND_OUTPUT,
        counted=True,
    ),
    "tq1_0": Mixture(36, "tq1_0", embedding="q4_k"),
    "tq2_0": Mixture(37, "tq2_0", embedding="q4_k"),
    "mxfp4_moe": Mixture(38, "mxfp4", output="q8_0", flat="q8_0"),
    "nvfp4": Mixture(39, "nvfp4"),
}
ALIASES = {"q3_k": "q3_k_m", "q4_k": "q4_k_m", "q5_k": "q5_k_m"}
FILE_TYPES: dict[str, int] = {name: mixture.file_type for name, mixture in MIXTURES.items()}
