"""Muon: what it makes orthogonal and how nearly, which parameters it leaves to AdamW, and its state."""

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.optimize import linprog
from torch import Tensor, distributed, nn

from data.batch import Batch
from models.checkpoint import Checkpoint, save_checkpoint
from models.float8 import Linear
from models.kernels import kernels
from models.portions import on_threads
from models.registry import ConfigError
from models.stages import muon
from models.stages.compute import Compute
from models.stages.muon import _LARGEST, _POLYNOMIALS, Muon, orthogonalised
from models.stages.optim import AdamW
from models.stages.sharded import Sharding
from models.stages.stage import restore_networks, restore_optimizer, stage_state, stage_tensors

MakeStage = Callable[..., Any]
NATIVE = [False, *([] if kernels() is None else [True])]
MakeBatch = Callable[..., Batch]


def spread(rows: int, columns: int, decades: int) -> Tensor:
    """A matrix whose singular values fall from 1 by so many powers of ten."""
    rng = torch.Generator().manual_seed(decades)
    rank = min(rows, columns)
    left, _ = torch.linalg.qr(torch.randn(rows, rank, generator=rng))
    right, _ = torch.linalg.qr(torch.randn(columns, rank, generator=rng))
    return left * torch.logspace(0, -decades, rank) @ right.T


def by_the_polynomial(matrix: Tensor) -> Tensor:
    """The same in float64 as it is written in the paper: the matrix itself is multiplied each time."""
    x = matrix.double() / matrix.double().norm()
    for a, b, c in _POLYNOMIALS:
        square = x @ x.T
        x = a * x + b * square @ x + c * square @ square @ x
    return x


def test_each_polynomial_is_the_nearest_to_1() -> None:
    """No other odd polynomial of fifth degree comes nearer on the interval that those before it leave."""
    low, high = 0.01, 1.0
    for coefficients in _POLYNOMIALS:
        s = torch.logspace(math.log10(low), math.log10(high), 2000, dtype=torch.float64)
        powers = torch.stack([s, s**3, s**5], 1)
        bound = -torch.ones(len(s), 1, dtype=torch.float64)
        best = linprog(
            [0, 0, 0, 1],
            A_ub=torch.cat([torch.cat([powers, bound], 1), torch.cat([-powers, bound], 1)]).numpy(),
            b_ub=[1.0] * len(s) + [-1.0] * len(s),
            bounds=[(None, None)] * 3 + [(0, None)],
        ).fun
        values = powers @ torch.tensor(coefficients, dtype=torch.float64)
        assert (values - 1).abs().max() == pytest.approx(best, abs=2e-3)
        low, high = 1 - best, 1 + best


@pytest.mark.parametrize(("decades", "error"), [(1, 1e-4), (3, 2e-3), (6, 2e-3)])
@pytest.mark.parametrize("shape", [(24, 24), (8, 200), (200, 8), (1, 5)])
def test_it_is_the_polynomial(shape: tuple[int, int], decades: int, error: float) -> None:
    matrix = spread(*shape, decades)
    matrices = torch.stack([matrix, 1e-6 * matrix, 1e3 * matrix])
    for made in orthogonalised(matrices):
        assert (made - by_the_polynomial(matrix)).abs().max() < error


def test_singular_values_come_near_1_and_vectors_stay() -> None:
    matrix = torch.randn(12, 40, generator=torch.Generator().manual_seed(3))
    made = orthogonalised(matrix[None])[0]
    values = torch.linalg.svdvals(made)
    assert values.min() > 0.72
    assert values.max() < 1.28
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    turned = left.T @ made @ right.T
    assert (turned - turned.diagonal().diag()).abs().max() < 1e-4


def test_zeros_stay_zeros() -> None:
    assert torch.equal(orthogonalised(torch.zeros(2, 3, 5)), torch.zeros(2, 3, 5))


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 6)
        self.position = nn.Parameter(torch.ones(1, 3, 2, 2))
        self.linear = Linear(6, 4)
        self.of_vectors = nn.Linear(6, 4)
        self.conv = nn.Conv2d(3, 8, 3)
        self.norm = nn.GroupNorm(2, 8)
        self.frozen = Linear(2, 2).requires_grad_(False)


def with_gradients(seed: int = 0) -> Network:
    torch.manual_seed(seed)
    network = Network()
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn_like(parameter)
    return network


def test_all_but_matrices_are_adamws_to_the_bit() -> None:
    mine, other = with_gradients(), with_gradients()
    optimizers = [Muon(lr=0.1).build(mine), AdamW(lr=0.1).build(other)]
    for _ in range(3):
        for optimizer in optimizers:
            optimizer.step()
    theirs = dict(other.named_parameters())
    same = {name for name, p in mine.named_parameters() if torch.equal(p, theirs[name])}
    assert same == set(theirs) - {"linear.weight", "conv.weight"}
    assert not torch.equal(mine.embedding.weight, with_gradients().embedding.weight)


def test_an_update_has_the_root_mean_square_that_is_told() -> None:
    network, before = with_gradients(), with_gradients()
    Muon(lr=0.5, update_rms=0.3, weight_decay=0.0).build(network).step()
    was = before.state_dict()
    for name in ("linear.weight", "conv.weight"):
        change = network.state_dict()[name] - was[name]
        assert change.square().mean().sqrt().item() == pytest.approx(0.15, rel=0.2)


@pytest.mark.parametrize("native", NATIVE)
def test_steps_by_hand(native: bool) -> None:
    network = Linear(6, 4, bias=False)
    weight, mean = network.weight.detach().clone(), torch.zeros(4, 6)
    optimizer = Muon(lr=0.1, momentum=0.8, weight_decay=0.5).build(network, native)
    for seed in range(3):
        gradient = torch.randn(4, 6, generator=torch.Generator().manual_seed(seed))
        network.weight.grad = gradient.clone()
        optimizer.step()
        mean = 0.8 * mean + 0.2 * gradient
        direction = by_the_polynomial(0.8 * mean + 0.2 * gradient).float()
        weight = weight * (1 - 0.1 * 0.5) - 0.1 * 0.2 * 6**0.5 * direction
        assert torch.allclose(network.weight, weight, atol=1e-5)


#: Layers: in whole registers, and with rows and columns that are missing; wide and tall; of more products
#: than are added at once; of one row.
SHAPES = [(32, 16, 3, 3), (8, 3, 3, 3), (16, 16, 1, 1), (48, 48), (40, 600), (600, 40), (1, 5), (130, 131)]


def layer(shape: tuple[int, ...]) -> Any:
    torch.manual_seed(len(shape))
    if len(shape) == 2:
        return Linear(shape[1], shape[0], bias=False)
    return nn.Conv2d(shape[1], shape[0], shape[2], bias=False).to(memory_format=torch.channels_last)


needs_kernels = pytest.mark.skipif(kernels() is None, reason="no kernels can be compiled here")


def stepped(layers: nn.ModuleList, native: bool, scales: Sequence[float]) -> torch.optim.Optimizer:
    """Steps with gradients that are multiples of the same drawn ones."""
    optimizer, rng = Muon(lr=0.1, weight_decay=0.3).build(layers, native), torch.Generator().manual_seed(1)
    for scale in scales:
        for p in layers.parameters():
            p.grad = torch.randn(p.shape, generator=rng) * scale
        optimizer.step()
    return optimizer


@needs_kernels
@pytest.mark.parametrize("threads", [1, 2])
def test_kernels_step_as_torch_does(threads: int) -> None:
    """Matrices too large for one thread among them, numbers as small as they come, and none but zeros."""
    shapes = [*SHAPES, (_LARGEST + 16, _LARGEST + 1)]
    mine, other = (nn.ModuleList(layer(shape) for shape in shapes) for _ in range(2))
    with on_threads(threads):
        optimizers = [
            stepped(mine, True, (1.0, 1e-20, 0.0, 1.0)),
            stepped(other, False, (1.0, 1e-20, 0.0, 1.0)),
        ]
    same = 0
    for one, two in zip(mine.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two, atol=5e-5, rtol=0)
        means = (o.state[p]["momentum"] for o, p in zip(optimizers, (one, two), strict=True))
        torch.testing.assert_close(*means, atol=1e-7, rtol=1e-6)
        same += torch.equal(one, two)
    assert same == 1  # the large one, or nothing went through the kernels


@needs_kernels
def test_the_number_of_threads_changes_no_bit() -> None:
    made = []
    for threads in (1, 2):
        layers = nn.ModuleList(layer(shape) for shape in SHAPES)
        with on_threads(threads):
            stepped(layers, True, (1.0, 1.0))
        made.append(list(layers.parameters()))
    assert all(torch.equal(one, two) for one, two in zip(*made, strict=True))


@needs_kernels
def test_a_gradient_that_is_no_number_is_not_hidden() -> None:
    layers = nn.ModuleList([layer((48, 48)), layer((32, 16, 3, 3))])
    optimizer = Muon(lr=0.1).build(layers, native=True)
    for p in layers.parameters():
        p.grad = torch.ones_like(p)
    next(layers.parameters()).grad[3, 5] = math.nan  # type: ignore[index]
    optimizer.step()
    assert [bool(p.isfinite().any()) for p in layers.parameters()] == [False, True]


def test_which_matrices_are_the_work_of_one_thread() -> None:
    assert muon._suits(torch.empty(_LARGEST, 5000))
    assert muon._suits(torch.empty(5000, _LARGEST))
    assert not muon._suits(torch.empty(_LARGEST + 1, _LARGEST + 1))
    assert not muon._suits(torch.empty(8, 8, dtype=torch.bfloat16))
    assert not muon._suits(torch.empty(8, 16)[:, ::2])


@pytest.mark.parametrize("native", NATIVE)
@pytest.mark.parametrize("of_gradient", [torch.contiguous_format, torch.channels_last])
def test_layouts_are_no_matter(of_gradient: torch.memory_format, native: bool) -> None:
    """Of the weight, of its gradient, and of a mean that a checkpoint brought."""
    network, other = with_gradients(), with_gradients().to(memory_format=torch.channels_last)
    optimizers = [Muon(lr=0.1).build(network, native), Muon(lr=0.1).build(other, native)]
    for _ in range(3):
        assert other.conv.weight.grad is not None
        other.conv.weight.grad = other.conv.weight.grad.contiguous(memory_format=of_gradient)
        for optimizer in optimizers:
            optimizer.step()
        state = optimizers[1].state[other.conv.weight]
        state["momentum"] = state["momentum"].contiguous()
    assert torch.allclose(network.conv.weight, other.conv.weight, atol=1e-6)
    assert other.conv.weight.is_contiguous(memory_format=torch.channels_last)


def test_the_learning_rate_of_every_group_counts() -> None:
    network = with_gradients()
    before = {name: p.clone() for name, p in network.named_parameters()}
    optimizer = Muon(lr=0.1).build(network)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1] * 3
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in network.named_parameters())


@pytest.mark.parametrize("native", NATIVE)
@pytest.mark.parametrize("first", [True, False])
def test_a_refused_step_changes_no_bit(first: bool, native: bool) -> None:
    """It is refused by a tensor, which on a GPU nobody waits for, and whatever its gradients are."""
    network, other = with_gradients(), with_gradients()
    optimizer, theirs = Muon(lr=0.1).build(network, native), Muon(lr=0.1).build(other, native)
    for each in (optimizer, theirs) if not first else ():
        each.found_inf = torch.tensor(0.0)
        each.step()
    gradients = {name: p.grad for name, p in network.named_parameters()}
    for p in network.parameters():
        p.grad = None if p.grad is None else p.grad.clone().fill_(math.nan)
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(network.parameters(), other.parameters(), strict=True))
    for name, p in network.named_parameters():
        p.grad = gradients[name]
    for each in (optimizer, theirs):
        each.found_inf = torch.tensor(0.0)
        each.step()
    assert all(torch.equal(p, q) for p, q in zip(network.parameters(), other.parameters(), strict=True))
    assert not torch.equal(network.conv.weight, with_gradients().conv.weight)


def test_without_a_gradient_nothing_moves() -> None:
    network = with_gradients()
    network.conv.weight.grad = None
    before = network.conv.weight.clone()
    optimizer = Muon(lr=0.1).build(network)
    optimizer.step()
    assert torch.equal(network.conv.weight, before)
    assert network.conv.weight not in optimizer.state


@pytest.mark.parametrize("native", NATIVE)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", ["autoencoder", "diffusion"])
def test_going_on_changes_no_bit(
    name: str, channels_last: bool, native: bool, make_stage: MakeStage, make_batch: MakeBatch, tmp_path: Path
) -> None:
    def begin(seed: int) -> tuple[Any, torch.optim.Optimizer]:
        stage = make_stage(name, seed=seed, optimizer=Muon(2e-3))
        if name == "diffusion":
            frozen = make_stage(name)._autoencoder[0].state_dict()
            stage.load_autoencoder({f"autoencoder.{k}": v for k, v in frozen.items()}, "test")
        stage.use(Compute(torch.device("cpu"), False, channels_last, False, "", native=native))
        return stage, stage.configure_optimizers()

    def steps(stage: Any, optimizer: torch.optim.Optimizer) -> None:
        for _ in range(2):
            stage.mean_loss(make_batch(4, stage.images_seen)).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            stage.images_seen += 4

    first, optimizer = begin(0)
    steps(first, optimizer)
    documents = {"config": {}, "state": stage_state(first, {})}
    checkpoint = Checkpoint(save_checkpoint(tmp_path, 8, stage_tensors(first, optimizer), documents))
    stored = {key.split(".", 1)[0] for key in checkpoint.tensors("optimizer")}
    assert stored == {"momentum", "exp_avg", "exp_avg_sq", "step"}
    steps(first, optimizer)

    second, again = begin(5)
    restore_networks(second, checkpoint)
    restore_optimizer(second, again, checkpoint)
    steps(second, again)
    theirs = second.networks.state_dict()
    assert all(torch.equal(theirs[key], value) for key, value in first.networks.state_dict().items())


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of this process."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_models_that_are_spread_are_refused() -> None:
    network = nn.ModuleDict({"linear": Linear(4, 4)})
    Sharding(1, 1, torch.device("cpu")).spread(network.children())
    with pytest.raises(ConfigError, match=r"trainer\.strategy=ddp"):
        Muon().build(network)


@pytest.mark.parametrize(
    "values",
    [{"lr": 0.0}, {"momentum": 1.0}, {"update_rms": 0.0}, {"update_rms": float("inf")}, {"beta1": 1.0},
     {"weight_decay": -1.0}],
)  # fmt: skip
def test_values_out_of_range(values: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(values))):
        Muon(**values)
