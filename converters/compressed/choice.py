"""Which schemes of integers each linear may have where a size is asked for, and the choice of least cost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import fsum

from converters.compressed.fused import of_one_scheme
from converters.compressed.pack import integer_nbytes
from converters.compressed.schemes import label_of, schemes_named
from converters.compressed.shapes import check_group, check_shapes, fits
from dsconvert.errors import UsageError
from dsconvert.quantization.allocate import Option
from dsconvert.quantization.budget import Budget, Nats
from dsconvert.quantization.gptq_grid import Scheme

INDEXER = ".indexer."
SIZES = (32, 64, 128)  # of groups, where none is asked for
# Types, where none are named: what 2 bits leave is too much for a cost to be foretold, so that a smaller size
# must ask for them.
USUAL = ("w3a16", "w4a16", "w5a16", "w6a16", "w8a16")
SMALLEST = ("w2a16", *USUAL)
Shapes = Mapping[str, tuple[int, ...]]
Candidates = dict[str, dict[str, Scheme]]  # by the name of a linear, then by label, the smallest first


def schemes_of(budget: Budget, sizes: tuple[int, ...], sym: bool, usual: Iterable[str]) -> list[Scheme]:
    """The schemes to choose from, `usual` ones where none are named; raises UsageError for unknown ones, and
    for a floor above all.
    """
    every = {name: schemes_named(name, sizes, sym) for name in budget.types or usual}
    least = min(scheme.bits for scheme in schemes_named(budget.floor, sizes, sym)) if budget.floor else 0
    found = [scheme for group in every.values() for scheme in group if scheme.bits >= least]
    for scheme in found:
        check_group(scheme)
    if not found:
        raise UsageError(
            f"--floor {budget.floor} leaves none of the types",
            why=f"they are {', '.join(every)}",
            hint="Give a lower --floor, or wider --types",
        )
    return list(dict.fromkeys(found))


def candidates(linears: Shapes, schemes: list[Scheme]) -> Candidates:
    """The schemes that each linear may have; those that runtimes fuse have the same.

    An indexer's have the widest: what it leaves out depends on longer texts than those that are measured.
    Raises QuantizationError that names a linear whose shape lets it have none.
    """
    found: Candidates = {}
    for members in of_one_scheme(linears).values():
        shapes = {name: linears[name] for name in members}
        fitting = [scheme for scheme in schemes if all(fits(shape, scheme) for shape in shapes.values())]
        if not fitting:
            check_shapes(shapes, schemes[0])
        by_size = sorted(fitting, key=lambda scheme: sum(nbytes(shape, scheme) for shape in shapes.values()))
        free = by_size[-1:] if INDEXER in members[0] else by_size
        labelled = {label_of(scheme): scheme for scheme in free}
        found |= dict.fromkeys(members, labelled)
    return found


def nbytes(shape: tuple[int, ...], scheme: Scheme) -> int:
    """Bytes of the tensors of a linear [N, K]."""
    outputs, inputs = shape
    return integer_nbytes(outputs, inputs, scheme.groups(inputs), scheme.bits, scheme.sym)


def options_of(linears: Shapes, choices: Candidates, nats: Nats) -> dict[str, dict[str, Option]]:
    """What is to be chosen, fused linears as one, by the first one's name: bits and nats of each scheme."""
    return {
        first: {
            label: Option(
                sum(8 * nbytes(linears[name], scheme) for name in members),
                fsum(nats[name][label] for name in members),
            )
            for label, scheme in choices[first].items()
        }
        for first, members in of_one_scheme(linears).items()
    }


def chosen(linears: Shapes, choices: Candidates, types: Mapping[str, str]) -> dict[str, Scheme]:
    """The scheme of every linear, of fused ones by the first one's label."""
    return {
        name: choices[first][types[first]]
        for first, members in of_one_scheme(linears).items()
        for name in members
    }


def smallest(choices: Candidates) -> dict[str, Scheme]:
    """The scheme of fewest bytes of every linear."""
    return {name: next(iter(schemes.values())) for name, schemes in choices.items()}
