"""Schemes by cost: sizes kept, the choice against all choices, costs against the solver, and targets."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import calibrated
import numpy as np
import pytest
import tiny
import torch
from click.testing import CliRunner

from converters.compressed import costs
from converters.compressed.choice import candidates, chosen, options_of, schemes_of
from converters.compressed.convert import convert
from converters.compressed.fused import FUSED, of_one_scheme
from converters.compressed.plan import prepare
from converters.compressed.reader import open_model
from converters.compressed.schemes import label_of
from converters.compressed.settings import groups_of, patterns
from dsconvert.cli import cli
from dsconvert.errors import CheckpointError, ConversionError, QuantizationError, UsageError
from dsconvert.events import Check, Event, Foretold, Planned, Step, TypesChosen
from dsconvert.models.config import load_json
from dsconvert.proof.sources import Opened
from dsconvert.proof.types_by_cost import types_by_cost
from dsconvert.quantization.budget import Budget, choose
from dsconvert.quantization.error_feedback import shared_factors
from dsconvert.quantization.gptq_grid import Scheme
from dsconvert.quantization.gptq_solver import SolverOptions, solve

TEXT: dict[str, Any] = {"calib": "builtin", "calib_samples": 4, "calib_len": 128}


def run(out: Path, budget: Budget, **more: Any) -> list[Event]:
    asked = {**TEXT, "effort": "off", **more}
    return list(convert(calibrated.compressed_options("sample:", out=out, budget=budget, **asked)))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Event]]:
    """The sample at 4.5 bits, proven, and what it said; costs.json beside it."""
    folder = tmp_path_factory.mktemp("mixed")
    budget = Budget(bpw=4.5, measurement=folder / "costs.json")
    return folder, run(folder / "out", budget, effort="quick")


def opened(folder: Path) -> Opened:
    from converters.outputs import open_output

    return open_output(folder)


def schemes_in(folder: Path) -> dict[str, str]:
    return {name: one.settings.label for name, one in open_model(folder).linears.items()}


def test_a_mixture_is_proven_and_told_of(made: tuple[Path, list[Event]]) -> None:
    folder, events = made
    checks = [event for event in events if isinstance(event, Check)]
    assert [check.detail for check in checks if not check.passed] == []
    (types,) = (event for event in events if isinstance(event, TypesChosen))
    (plan,) = (event for event in events if isinstance(event, Planned))
    (foretold,) = (event for event in events if isinstance(event, Foretold))
    assert 4.4 < types.bits_per_weight <= 4.5
    assert plan.nbytes == (types.nbytes,)
    stored = open_model(folder / "out").checkpoint.tensors.values()
    assert types.nbytes == sum(tensor.nbytes for tensor in stored)
    assert foretold.measured == next(check.value for check in checks if check.name == "mean KLD")
    assert 0 < foretold.nats < foretold.measured  # by far: of 512 tokens
    labels = schemes_in(folder / "out")
    assert len(set(labels.values())) > 1
    alike = {name: (nbytes, nats) for name, nbytes, nats in types.rules}
    assert {"w4a16-128g", "w4a16-32g", "w8a16-128g", "w3a16-64g"} <= alike.keys()
    assert all(nats > types.nats for nbytes, nats in alike.values() if nbytes <= types.nbytes)


def test_the_folder_says_how_it_was_made(made: tuple[Path, list[Event]]) -> None:
    found = opened(made[0] / "out")
    (types,) = (event for event in made[1] if isinstance(event, TypesChosen))
    assert re.fullmatch(r"compressed-4\.[45]\dbpw", found.quant)
    said = types_by_cost(found)
    assert said["types"] == f"by cost for 4.5 bits per weight, foretold KL {types.nats:.3g}"
    assert said["other sizes' foretold KL"].startswith(f"{types.curve[0][0]:,} bytes")


def test_fused_linears_are_alike_and_targets_name_each_linear_once(made: tuple[Path, list[Event]]) -> None:
    folder = made[0] / "out"
    labels, groups = (
        schemes_in(folder),
        load_json(folder / "config.json")["quantization_config"]["config_groups"],
    )
    for name, label in labels.items():
        stem, _, last = name.rpartition(".")
        for group in (group for group in FUSED if last in group):
            assert {labels[f"{stem}.{one}"] for one in group if f"{stem}.{one}" in labels} == {label}
        found = [g for g in groups.values() if any(re.match(t[3:], name) for t in g["targets"])]
        assert len(found) == 1
        weights = found[0]["weights"]
        assert label == label_of(
            Scheme(weights["num_bits"], weights["group_size"] or -1, weights["symmetric"])
        )
    assert not any(re.match(t[3:], "lm_head") for g in groups.values() for t in g["targets"])


def test_a_folder_is_at_most_as_big_as_was_asked(made: tuple[Path, list[Event]], tmp_path: Path) -> None:
    """With the costs that are kept, and no text measured again; the same bytes twice."""
    known, size = made[0] / "costs.json", 2_990_000
    events = run(tmp_path / "a", Budget(size=size, measurement=known))
    assert any(isinstance(event, Step) and "taking the costs in" in event.text for event in events)
    assert not any(isinstance(event, Step) and "measured block" in event.text for event in events)
    written = (tmp_path / "a" / "model.safetensors").stat().st_size
    assert size - 30_000 < written <= size
    run(tmp_path / "again", Budget(bpw=4.5, measurement=known))
    assert calibrated.digests(tmp_path / "again") == calibrated.digests(made[0] / "out")


def test_a_run_that_was_stopped_measures_no_block_twice(
    made: tuple[Path, list[Event]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped = calibrated.stopper(monkeypatch)
    asked = Budget(bpw=4.5)
    stopped(lambda: run(tmp_path / "out", asked), tmp_path / "out", 1)
    with pytest.raises(CheckpointError, match="another options"):
        run(tmp_path / "out", Budget(bpw=5), resume=True)
    events = run(tmp_path / "out", asked, resume=True)
    assert not any(isinstance(event, Step) and "measured block" in event.text for event in events)
    ours, whole = (calibrated.digests(folder) for folder in (tmp_path / "out", made[0] / "out"))
    assert ours["model.safetensors"] == whole["model.safetensors"]


def test_the_choice_is_the_best_of_all() -> None:
    """Of two blocks' worth of fused linears: every choice tried."""
    rng = np.random.default_rng(2)
    shapes = {
        f"l.{i}.{n}_proj.weight": (64, 128) for i in range(2) for n in ("q", "k", "v", "o", "gate", "up")
    }
    choices = candidates(shapes, schemes_of(Budget(types=("w2a16", "w4a16-32g", "w8a16")), (64,), True, ()))
    nats = {
        name: {label: rng.uniform(0.5, 2) * 4.0**-one.bits for label, one in own.items()}
        for name, own in choices.items()
    }
    parts = options_of(shapes, choices, nats)
    assert list(parts) == [f"l.{i}.{n}_proj.weight" for i in range(2) for n in ("q", "o", "gate")]
    weights = 12 * 64 * 128
    for bpw in (2.5, 3.3, 4.7, 6.1):
        found = choose(parts, weights, int(bpw * weights), "so many bits")
        every = itertools.product(*(own.values() for own in parts.values()))
        fitting = [one for one in every if sum(option.bits for option in one) <= bpw * weights]
        assert found.nats == pytest.approx(min(sum(option.error for option in one) for one in fitting))
        schemes = chosen(shapes, choices, found.types)
        assert schemes["l.1.k_proj.weight"] == schemes["l.1.q_proj.weight"]
        assert schemes["l.0.up_proj.weight"] == schemes["l.0.gate_proj.weight"]


@pytest.mark.parametrize("act_order", [True, False])
def test_what_is_foretold_is_what_the_solver_leaves(act_order: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(900, 64, generator=generator) @ torch.randn(64, 256, generator=generator)
    x = (x + torch.randn(900, 256, generator=generator)) * torch.exp(torch.randn(256, generator=generator))
    W, s = torch.randn(96, 256, generator=generator), torch.exp(torch.randn(96, generator=generator))
    H, schemes = 2 / 900 * x.T @ x, [Scheme(bits, 32, bits != 3) for bits in (3, 4, 8)]
    H[5], H[:, 5] = 0, 0  # an input that is never active
    options = calibrated.compressed_options("sample:", act_order=act_order)
    factor = shared_factors()
    found = costs.linear_costs(W, H, H, s, schemes, options, factor)
    for scheme in schemes:
        rounds = int(scheme.bits == 3)  # by default
        solved = solve(W, H, SolverOptions(scheme, act_order, rounds=rounds))
        E = W - solved.dequantized()
        real = float((((E @ H) * E).sum(1) * s).sum()) / 4
        assert found[label_of(scheme)] == pytest.approx(real, rel=1e-5)
    other = costs.linear_costs(W, H, 2 * H, s, schemes, options, factor)  # it is judged by the second one
    assert other == pytest.approx({label: 2 * nats for label, nats in found.items()})


def test_patterns_match_what_they_are_of_and_nothing_else() -> None:
    """Whatever runtimes call the part before the layers; experts of a layer are one."""
    stems = [f"model.language_model.layers.{i}.self_attn.{n}_proj" for i in (1, 11) for n in "qkv"]
    stems += [f"model.language_model.layers.1.mlp.experts.{e}.up_proj" for e in range(12)]
    found = [re.compile(text.removeprefix("re:")) for text in patterns([*stems, "lm_head"])]

    def matched(name: str) -> bool:
        return any(one.match(name) for one in found)

    assert all(map(matched, [*stems, "lm_head", "language_model.model.layers.11.self_attn.k_proj"]))
    for other in (
        "model.vision_model.encoder.layers.1.self_attn.q_proj",
        "model.language_model.layers.2.self_attn.q_proj",
        "model.language_model.layers.111.self_attn.q_proj",
        "model.language_model.layers.11.mlp.experts.3.up_proj",
        "model.language_model.layers.1.self_attn.o_proj",
        "model.language_model.layers.1.self_attn.q_proj.lora",
    ):
        assert not matched(other), other
    assert [weights["num_bits"] for _, weights in groups_of({"a": Scheme(2), "b": Scheme(8)})] == [8, 2]


def test_experts_of_a_layer_have_one_scheme() -> None:
    names = [
        f"m.layers.{i}.mlp.experts.{e}.{n}_proj.weight"
        for i in range(2)
        for e in range(3)
        for n in ("gate", "down")
    ]
    found = of_one_scheme([*names, "m.layers.0.mlp.shared_experts.up_proj.weight"])
    assert [len(members) for members in found.values()] == [6, 6, 1]
    assert of_one_scheme(["lm_head.weight"]) == {"lm_head.weight": ("lm_head.weight",)}


def test_types_and_floor_bound_the_choice(tmp_path: Path) -> None:
    """A linear takes only groups that divide its inputs, and one that takes none is named."""
    model = tiny.tiny_checkpoint(tmp_path / "model", d=64, ff=192)
    asked = {"budget": Budget(bpw=5, types=("w3a16", "w4a16-32g-asym", "w8a16"), floor="w4a16")}
    choices = prepare(calibrated.compressed_options(model, out=tmp_path / "out", **asked)).choices
    assert list(choices["model.layers.0.mlp.down_proj.weight"]) == [
        "w4a16-32g-asym",
        "w8a16-64g",
        "w8a16-32g",
    ]
    assert prepare(
        calibrated.compressed_options(model, out=tmp_path / "out", **asked, group_sizes=(-1,))
    ).choices["model.layers.0.mlp.down_proj.weight"].keys() == {"w4a16-32g-asym", "w8a16"}
    for budget, said in (
        (Budget(bpw=5, types=("w3a16",), floor="w4a16"), "leaves none"),
        (Budget(bpw=5, types=("w7a16",)), "'w7a16' is unknown"),
        (Budget(bpw=5, types=("w4a16-48g",)), "groups of 48"),
        (Budget(bpw=2), "as small as 2 bits per weight"),
        (Budget(size=1000), "as small as 1,000 bytes"),
        (Budget(vram=1 << 20), "does not fit the card"),
    ):
        with pytest.raises(UsageError, match=said):
            prepare(calibrated.compressed_options(model, out=tmp_path / "out", budget=budget))
    with pytest.raises(QuantizationError, match=r"mlp\.|self_attn\."):
        budget = Budget(bpw=5, types=("w4a16-128g",))
        prepare(calibrated.compressed_options(model, out=tmp_path / "out", budget=budget))


def test_costs_of_other_settings_are_refused(made: tuple[Path, list[Event]], tmp_path: Path) -> None:
    budget = Budget(bpw=5, measurement=made[0] / "costs.json")
    with pytest.raises(CheckpointError, match="another solver"):
        run(tmp_path / "out", budget, damp=0.2)
    with pytest.raises(CheckpointError, match="no cost of"):
        run(tmp_path / "out", budget, sym=False)
    (bad := tmp_path / "bad.json").write_text(json.dumps({"nats": {"a": {"w4": -1}}}))
    with pytest.raises(ConversionError, match="not a readable measurement"):
        run(tmp_path / "out", Budget(bpw=5, measurement=bad))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--bpw 4 --scheme w4a16", "--scheme has no effect beside --bpw"),
        ("--bpw 4 --size 4G", "two sizes"),
        ("--types w4a16", "--types has no effect without --bpw, --size or --vram"),
    ],
)
def test_options_that_make_no_sense_together_are_refused(words: str, said: str) -> None:
    done = CliRunner().invoke(cli, ["compressed", "sample:", *words.split()])
    assert done.exit_code == 2
    assert said in " ".join(done.stderr.split())
