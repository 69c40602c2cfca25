"""Promise: each recipe rounds each operand of a layer's three products as it says; torchao gets the same numbers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from configs.precision import LOW
from configs.schema import JobConfig
from parallelism.lowp_emulated import EmulatedKernel
from parallelism.lowp_formats import E4M3, E5M2, rounded, rounded_in_blocks, rounded_in_nvfp4
from parallelism.lowp_groups import padded
from parallelism.lowp_recipes import RECIPES, Operand
from parallelism.lowp_state import Kernel, Lowp, Site
from parallelism.precision import Precision
from tests.distributed.layouts import tiny

TOKENS, INPUTS, OUTPUTS = 64, 96, 32
# Root mean square of what is lost, over that of the product, with operands that are normally distributed. A mantissa of
# m bits is off by 2^-(m+1) / sqrt(3) on average at most: 0.036 for E4M3 and 0.072 for E5M2, and errors of two operands
# add up as squares do. The bound of FP4, whose scales are rounded too, was measured.
LOST = {"fp8_current": 0.081, "fp8_block": 0.052, "fp8_delayed": 0.081, "mxfp8": 0.052, "nvfp4": 0.25}


class Products(msgspec.Struct, frozen=True):
    """What forward and backward gave."""

    y: Tensor
    x_grad: Tensor
    weight_grad: Tensor


@pytest.fixture(scope="module", autouse=True)
def _alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process group of one, for the recipe that reduces over all ranks."""
    store = dist.FileStore(str(tmp_path_factory.mktemp("group") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def site_of(recipe: str, kernel: Kernel | None = None, config: JobConfig | None = None, reuse: bool = False) -> Site:
    lowp = Lowp(config or tiny(), Precision(recipe, "emulated", "fp32"), kernel or EmulatedKernel(), reuse)
    site = lowp.add_site("layers.0.attention.wo")
    lowp.materialise(torch.device("cpu"))
    lowp.begin(1, 0)
    return site


def operands(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight, dy."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(shape, generator=generator) for shape in ((TOKENS, INPUTS), (OUTPUTS, INPUTS), (TOKENS, OUTPUTS))
    )  # type: ignore[return-value]


def compute(site: Site, seed: int = 0, rows: slice = slice(None)) -> Products:
    x, weight, grad = operands(seed)
    x, weight = x[rows].clone().requires_grad_(), weight.clone().requires_grad_()
    y = site.kernel.linear(site, x, weight, 0)
    (y * grad[rows]).sum().backward()
    assert x.grad is not None
    assert weight.grad is not None
    return Products(y.detach(), x.grad, weight.grad)


def same(one: Products, other: Products) -> bool:
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in ("y", "x_grad", "weight_grad"))


def test_every_recipe_is_known_everywhere() -> None:
    """In the configuration's words, in the facts about cards, and here."""
    assert set(RECIPES) == set(LOW) == set(LOST)


@pytest.mark.parametrize("recipe", LOST)
def test_all_three_products_are_near_the_exact_ones(recipe: str) -> None:
    """And are not the exact ones: each was rounded."""
    x, weight, grad = operands()
    exact = Products(x @ weight.t(), grad @ weight, grad.t() @ x)
    found = compute(site_of(recipe))
    for name in ("y", "x_grad", "weight_grad"):
        wanted, got = getattr(exact, name), getattr(found, name)
        lost = float((wanted - got).norm() / wanted.norm())
        assert 0.01 < lost < LOST[recipe], name


def test_current_scaling_multiplies_e4m3_forward_and_e5m2_gradients() -> None:
    """Written out: one scale a tensor, the same numbers in every product that an operand is in."""
    x, weight, grad = operands()
    x8, weight8 = (rounded(each, E4M3, each.abs().amax()) for each in (x, weight))
    grad8 = rounded(grad, E5M2, grad.abs().amax())
    wanted = Products(x8 @ weight8.t(), grad8 @ weight8, grad8.t() @ x8)
    assert same(compute(site_of("fp8_current")), wanted)


def test_block_scaling_runs_along_what_is_contracted() -> None:
    """Written out: 1 x 128 of activations and gradients, anew over tokens; 128 x 128 of weights, once."""
    x, weight, grad = operands()

    def along(values: Tensor) -> Tensor:
        return rounded_in_blocks(values, E4M3, (1, 128))

    weight8 = rounded_in_blocks(weight, E4M3, (128, 128))
    wanted = Products(along(x) @ weight8.t(), along(grad) @ weight8, along(grad.t()) @ along(x.t()).t())
    assert same(compute(site_of("fp8_block")), wanted)


def test_mxfp8_rounds_a_weight_for_each_of_its_products() -> None:
    """Written out: 1 x 32 everywhere, along outputs for the gradient of the input."""
    x, weight, grad = operands()

    def along(values: Tensor) -> Tensor:
        return rounded_in_blocks(values, E4M3, (1, 32))

    wanted = Products(
        along(x) @ along(weight).t(), along(grad) @ along(weight.t()).t(), along(grad.t()) @ along(x.t()).t()
    )
    assert same(compute(site_of("mxfp8")), wanted)


def test_nvfp4_rounds_forward_to_the_nearest_and_gradients_by_chance() -> None:
    """The forward product is plain; another step draws other gradients, the same step the same ones."""
    x, weight, _ = operands()
    site = site_of("nvfp4")
    first = compute(site)
    assert torch.equal(first.y, rounded_in_nvfp4(x, (1, 16)) @ rounded_in_nvfp4(weight, (16, 16)).t())
    site.shared.begin(1, 0)
    assert same(compute(site), first)
    site.shared.begin(2, 0)
    later = compute(site)
    assert torch.equal(later.y, first.y)
    assert not torch.equal(later.x_grad, first.x_grad)
    assert not torch.equal(later.weight_grad, first.weight_grad)


def test_chance_does_not_depend_on_how_the_batch_is_cut() -> None:
    """Half of the rows at a time, or by two dp ranks: each row's gradient is what it is in the whole batch."""
    config = tiny(dp_shard=2)
    share = config.training.global_batch_size // 2 * config.training.seq_len
    assert share == TOKENS
    x, weight, grad = operands()
    # One scale a tensor is that of the rows at hand: give them all the same largest value.
    grad[::32, 0] = 10.0

    def x_grad(site: Site, rows: slice) -> Tensor:
        part = x[rows].clone().requires_grad_()
        (site.kernel.linear(site, part, weight, 0) * grad[rows]).sum().backward()
        assert part.grad is not None
        return part.grad

    halves = site_of("nvfp4")
    pieces = [x_grad(halves, slice(0, 32)), x_grad(halves, slice(32, 64))]
    assert torch.equal(torch.cat(pieces), x_grad(site_of("nvfp4"), slice(0, 64)))
    second = site_of("nvfp4", config=config)
    second.shared.begin(1, 1)
    assert second.shared.rows(0, 16) == range(TOKENS, TOKENS + 16)
    assert second.shared.rows(0, 16) == range(TOKENS + 16, TOKENS + 32)


def test_delayed_scaling_takes_the_scale_of_past_steps() -> None:
    """The first step has none and takes its own; later ones saturate at the largest value of the history."""
    site = site_of("fp8_delayed")
    current = compute(site_of("fp8_current"))
    assert same(compute(site), current)
    assert site.shared.history is not None
    assert not site.shared.history.any(), "a step becomes history with its update"
    site.shared.updated()
    x, weight, grad = operands()
    assert site.shared.history[0, :, 0].tolist() == [float(each.abs().amax()) for each in (x, weight, grad)]
    site.shared.begin(2, 0)
    huge = site.kernel.linear(site, 100 * x, weight, 0)
    x8 = rounded(100 * x, E4M3, x.abs().amax())
    assert float(x8.abs().max()) <= 2 * float(x.abs().max())
    assert torch.equal(huge, x8 @ rounded(weight, E4M3, weight.abs().amax()).t())


def test_what_was_no_step_leaves_no_scale_behind() -> None:
    """A discarded batch, and a measurement without gradients."""
    site = site_of("fp8_delayed")
    compute(site)
    site.shared.forget()
    x, weight, _ = operands(1)
    with torch.no_grad():
        site.kernel.linear(site, 50 * x, weight, 0)
    site.shared.updated()
    assert site.shared.history is not None
    assert not site.shared.history.any()


def test_the_history_is_as_long_as_it_was_set_to() -> None:
    """A spike is forgotten after so many steps."""
    config = tiny()
    short = msgspec.structs.replace(config.precision, amax_history_steps=2)
    site = site_of("fp8_delayed", config=msgspec.structs.replace(config, precision=short))
    largest = []
    for size in (8.0, 1.0, 1.0):
        site.shared.amax(site, Operand.INPUT, torch.tensor([size]), record=True)
        site.shared.updated()
        assert site.shared.history is not None
        largest.append(float(site.shared.history[0, Operand.INPUT].amax()))
    assert largest == [8.0, 8.0, 1.0]


@pytest.mark.parametrize("recipe", LOST)
def test_a_kept_weight_gives_the_same_numbers_and_is_rounded_once(recipe: str) -> None:
    """Over the microbatches of a step; the update ends it."""
    site, plain = site_of(recipe, reuse=True), site_of(recipe)
    assert all(same(compute(site), compute(plain)) for _ in range(2))
    made: list[int] = []
    for _ in range(3):
        site.shared.weight("w", lambda: made.append(1))
    assert len(made) == 1
    site.shared.updated()
    site.shared.weight("w", lambda: made.append(1))
    assert len(made) == 2


@pytest.mark.parametrize("recipe", LOST)
def test_experts_compute_what_each_would_alone(recipe: str) -> None:
    """One with no tokens has a gradient of zero; rows of no expert give zeros and get none."""
    site = site_of(recipe)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(TOKENS, INPUTS, generator=generator).requires_grad_()
    weight = torch.randn(3, OUTPUTS, INPUTS, generator=generator).requires_grad_()
    y = site.kernel.grouped(site, x, weight, torch.tensor([16, 16, 48], dtype=torch.int32))
    y.square().sum().backward()
    assert x.grad is not None
    assert weight.grad is not None
    assert not y[48:].any()
    assert not x.grad[48:].any()
    assert not weight.grad[1].any()
    assert weight.grad[0].any()
    if recipe != "fp8_delayed":
        assert torch.equal(y[:16], site_alone(recipe).linear(site, x[:16], weight[0], 0))


def site_alone(recipe: str) -> Any:
    """A kernel as it is."""
    return site_of(recipe).kernel


def test_no_tokens_at_all_still_give_a_gradient() -> None:
    """Replicas of the experts wait for it."""
    site = site_of("fp8_current")
    x, weight = torch.randn(8, INPUTS).requires_grad_(), torch.randn(2, OUTPUTS, INPUTS).requires_grad_()
    site.kernel.grouped(site, x, weight, torch.tensor([0, 0], dtype=torch.int32)).sum().backward()
    assert weight.grad is not None
    assert not weight.grad.any()


def test_groups_are_filled_up_and_found_again() -> None:
    """Each group begins at a multiple; rows of no group are dropped."""
    x = torch.arange(20.0)[:, None] + 1
    rows, ends, places = padded(x, torch.tensor([3, 3, 17], dtype=torch.int32), 8)
    assert ends.tolist() == [8, 8, 24]
    assert torch.equal(rows[places][:17], x[:17])
    assert torch.equal(rows[:8, 0], torch.tensor([1.0, 2, 3, 0, 0, 0, 0, 0]))
    assert torch.equal(rows[8:22], x[3:17])
    assert not rows[22:-1].any()


@pytest.mark.parametrize(("recipe", "experts"), [("fp8_current", 0), ("fp8_delayed", 0), ("mxfp8", 0), ("mxfp8", 1)])
def test_torchao_computes_the_same_numbers(recipe: str, experts: bool) -> None:
    """Bit for bit, forward and backward: an oracle that somebody else wrote."""
    pytest.importorskip("torchao")
    from parallelism.lowp_torchao import torchao_kernel

    def run(kernel: Kernel) -> list[Tensor]:
        site = site_of(recipe, kernel)
        if not experts:
            found = compute(site)
            return [found.y, found.x_grad, found.weight_grad]
        generator = torch.Generator().manual_seed(3)
        x = torch.randn(TOKENS, INPUTS, generator=generator, dtype=torch.bfloat16).requires_grad_()
        weight = torch.randn(3, OUTPUTS, INPUTS, generator=generator, dtype=torch.bfloat16).requires_grad_()
        y = kernel.grouped(site, x, weight, torch.tensor([10, 10, 50], dtype=torch.int32))
        y[:50].square().sum().backward()
        assert x.grad is not None
        assert weight.grad is not None
        return [y[:50], x.grad, weight.grad]

    ours, theirs = run(EmulatedKernel()), run(torchao_kernel(recipe, emulate=True))
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
