"""The border to torch: devices, dtypes, arrays and random numbers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from skode.exceptions import DeviceError
from skode.runtime import (
    as_array,
    own_randomness,
    resolve_device,
    resolve_dtype,
    seed_sequence,
    to_numpy,
    to_tensor,
    torch_dtype,
    torch_generator,
)

CPU = torch.device("cpu")


def machine(monkeypatch: pytest.MonkeyPatch, *, cuda: int = 0, mps: bool = False) -> None:
    """A machine with that many CUDA devices, and MPS or not."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)


# --- devices ---


@pytest.mark.parametrize(
    ("parts", "dtype", "expected"),
    [
        ({}, "auto", "cpu"),
        ({"cuda": 1}, "auto", "cuda"),
        ({"cuda": 1, "mps": True}, "auto", "cuda"),
        ({"cuda": 1}, "float64", "cuda"),
        ({"mps": True}, "auto", "mps"),
        ({"mps": True}, "float32", "mps"),
        ({"mps": True}, np.float64, "cpu"),
        ({"mps": True}, torch.float64, "cpu"),
    ],
)
def test_auto_takes_the_best_device_for_the_dtype(
    monkeypatch: pytest.MonkeyPatch, parts: dict[str, int], dtype: object, expected: str
) -> None:
    machine(monkeypatch, **parts)  # type: ignore[arg-type]
    assert resolve_device("auto", dtype) == torch.device(expected)


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu"), "cpu:0"])
def test_the_cpu_is_always_there(device: str | torch.device) -> None:
    assert resolve_device(device).type == "cpu"


@pytest.mark.parametrize("device", ["gpu", "", "cuda:x", "CPU!", 1.5, object()])
def test_an_unknown_device_is_refused(device: object) -> None:
    with pytest.raises(DeviceError, match="is not a torch device; use 'auto', 'cpu', 'cuda'"):
        resolve_device(device)  # type: ignore[arg-type]


@pytest.mark.parametrize("device", ["cuda", "cuda:0", torch.device("cuda"), "mps", "meta"])
def test_an_absent_device_is_refused_with_those_present(
    monkeypatch: pytest.MonkeyPatch, device: str | torch.device
) -> None:
    machine(monkeypatch)
    with pytest.raises(DeviceError, match=r"is not available on this machine \(available: cpu\); use device='auto'"):
        resolve_device(device)


def test_a_device_number_beyond_the_last_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, cuda=2)
    assert resolve_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(DeviceError, match=r"'cuda:2' is not available on this machine \(available: cpu, cuda\)"):
        resolve_device("cuda:2")


def test_a_device_error_is_a_value_error() -> None:
    assert issubclass(DeviceError, ValueError)


# --- dtypes ---


@pytest.mark.parametrize(
    ("dtype", "data", "device", "expected"),
    [
        ("auto", np.float32, "cpu", np.float32),
        ("auto", np.float64, "cpu", np.float64),
        ("auto", np.float16, "cpu", np.float64),
        ("auto", np.int64, "cpu", np.float64),
        ("auto", np.int8, "cpu", np.float64),
        ("auto", np.bool_, "cpu", np.float64),
        ("auto", np.float64, "cuda", np.float32),
        ("auto", np.float64, "mps", np.float32),
        ("float32", np.float64, "cpu", np.float32),
        ("float64", np.float32, "cpu", np.float64),
        ("float64", np.float32, "cuda", np.float64),
        (np.float32, np.float64, "cpu", np.float32),
        (np.dtype("float64"), np.float32, "cpu", np.float64),
        (torch.float32, np.float64, "cpu", np.float32),
    ],
)
def test_the_dtype_follows_the_argument_the_data_and_the_device(
    dtype: object, data: type, device: str, expected: type
) -> None:
    resolved = resolve_dtype(dtype, np.dtype(data), torch.device(device))  # type: ignore[arg-type]
    assert resolved == np.dtype(expected)
    assert isinstance(resolved, np.dtype)


@pytest.mark.parametrize("dtype", ["float16", "int64", "complex128", np.int32, torch.float16])
def test_a_dtype_that_cannot_compute_is_refused(dtype: object) -> None:
    with pytest.raises(ValueError, match="is not supported; use 'auto', 'float32' or 'float64'"):
        resolve_dtype(dtype, np.dtype(float), CPU)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", ["double precision", torch.bfloat16])
def test_a_dtype_that_numpy_does_not_know_is_refused(dtype: object) -> None:
    # Packages such as ml_dtypes teach NumPy bfloat16.
    with pytest.raises(ValueError, match=r"is not (understood|supported); use 'auto', 'float32' or 'float64'"):
        resolve_dtype(dtype, np.dtype(float), CPU)  # type: ignore[arg-type]


def test_mps_does_not_compute_in_float64() -> None:
    with pytest.raises(DeviceError, match="use dtype='float32' or device='cpu'"):
        resolve_dtype("float64", np.dtype(np.float32), torch.device("mps"))


def test_numpy_dtypes_become_torch_dtypes() -> None:
    assert torch_dtype(np.dtype(np.float32)) is torch.float32
    assert torch_dtype(np.dtype(np.float64)) is torch.float64


# --- arrays ---


def test_a_read_only_array_is_copied() -> None:
    array = np.arange(6.0).reshape(3, 2)
    array.flags.writeable = False
    tensor = to_tensor(array, torch.float64, CPU)
    tensor += 1
    assert array[0, 0] == 0.0
    np.testing.assert_array_equal(to_numpy(tensor), array + 1)


@pytest.mark.parametrize(
    "view", [lambda a: a.T, lambda a: a[::2], lambda a: a[::-1], lambda a: a[:, ::-1], np.asfortranarray]
)
def test_views_become_contiguous_tensors(view: Callable[[np.ndarray], np.ndarray]) -> None:
    array = view(np.arange(12.0).reshape(4, 3))
    tensor = to_tensor(array, torch.float64, CPU)
    assert tensor.is_contiguous()
    np.testing.assert_array_equal(tensor.numpy(), array)


@pytest.mark.parametrize("source", [np.float32, np.float64, np.int16, np.int64, np.uint8, np.bool_])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tensors_have_the_dtype_asked_for(source: type, dtype: torch.dtype) -> None:
    array = np.array([[0, 1], [1, 0]], dtype=source)
    tensor = to_tensor(array, dtype, CPU)
    assert tensor.dtype == dtype
    np.testing.assert_array_equal(tensor.numpy(), array)


def test_memory_is_shared_where_it_can_be() -> None:
    array = np.arange(4.0)
    to_tensor(array, torch.float64, CPU)[0] = 7
    assert array[0] == 7


def test_an_empty_array_becomes_an_empty_tensor() -> None:
    assert to_tensor(np.empty((0, 3)), torch.float32, CPU).shape == (0, 3)


def test_tensors_become_arrays_with_memory_of_their_own() -> None:
    tensor = torch.ones(2, 2, requires_grad=True)
    array = to_numpy(tensor)
    array[:] = 5
    assert torch.equal(tensor.detach(), torch.ones(2, 2))
    assert array.flags.writeable and array.flags.owndata


@pytest.mark.parametrize("requires_grad", [False, True])
def test_torch_tensors_are_taken_as_arrays(requires_grad: bool) -> None:
    tensor = torch.arange(6.0).view(2, 3).t().clone().requires_grad_(requires_grad)
    array = as_array(tensor)
    assert isinstance(array, np.ndarray)
    np.testing.assert_array_equal(array, [[0, 3], [1, 4], [2, 5]])


def test_what_is_no_tensor_passes_through() -> None:
    for value in ([[1.0]], np.ones(2), None, "text"):
        assert as_array(value) is value


# --- random numbers ---

DRAWS: dict[str, Callable[[], Tensor]] = {
    "linear": lambda: nn.Linear(3, 2).weight,
    "convolution": lambda: nn.Conv2d(2, 3, 3).weight,
    "convolution's bias": lambda: nn.Conv2d(2, 3, 3).bias,
    "recurrent": lambda: nn.GRU(3, 4).weight_hh_l0,
    "embedding": lambda: nn.Embedding(5, 3).weight,
    "attention": lambda: nn.MultiheadAttention(4, 2).in_proj_weight,
    "orthogonal": lambda: nn.init.orthogonal_(torch.empty(4, 4)),
    "normal": lambda: nn.init.normal_(torch.empty(4, 4)),
    "truncated normal": lambda: nn.init.trunc_normal_(torch.empty(4, 4)),
    "kaiming": lambda: nn.init.kaiming_normal_(torch.empty(4, 4)),
    "sparse": lambda: nn.init.sparse_(torch.empty(6, 6), 0.5),
    "dropout": lambda: nn.Dropout(0.5)(torch.ones(50)),
    "dropout with gradients": lambda: nn.Dropout(0.5)(torch.ones(50, requires_grad=True)),
    "dropout of channels": lambda: nn.Dropout2d(0.5)(torch.ones(1, 50, 2, 2)),
    "rand": lambda: torch.rand(4),
    "rand_like": lambda: torch.rand_like(torch.ones(4)),
    "randn": lambda: torch.randn(4),
    "randn_like": lambda: torch.randn_like(torch.ones(4)),
    "normal of means": lambda: torch.normal(torch.zeros(4), torch.ones(4)),
    "randint": lambda: torch.randint(10**6, (4,)),
    "randint from": lambda: torch.randint(5, 10**6, (4,)),
    "randperm": lambda: torch.randperm(20),
    "bernoulli": lambda: torch.bernoulli(torch.full((50,), 0.5)),
    "multinomial": lambda: torch.multinomial(torch.ones(20), 8),
    "exponential": lambda: torch.empty(4).exponential_(),
    "poisson": lambda: torch.poisson(torch.full((20,), 50.0)),
}


def drawn(draw: Callable[[], Tensor], seed: int) -> Tensor:
    with own_randomness(torch.Generator().manual_seed(seed)):
        return draw().detach()


@pytest.mark.parametrize("name", DRAWS)
def test_own_randomness_is_reproducible_and_leaves_the_global_generator_alone(name: str) -> None:
    before = torch.get_rng_state()
    first, second, other = (drawn(DRAWS[name], seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_own_randomness_advances_its_generator() -> None:
    generator = torch.Generator().manual_seed(1)
    draws = []
    for _ in range(2):
        with own_randomness(generator):
            draws.append(torch.rand(4))
    assert not torch.equal(*draws)


def test_a_generator_given_to_the_operation_is_kept() -> None:
    with own_randomness(torch.Generator().manual_seed(1)):
        found = torch.rand(4, generator=torch.Generator().manual_seed(9))
    assert torch.equal(found, torch.rand(4, generator=torch.Generator().manual_seed(9)))


def test_own_randomness_ends_with_its_block_also_after_an_error() -> None:
    state = torch.get_rng_state()
    try:
        with pytest.raises(RuntimeError, match="on purpose"), own_randomness(torch.Generator().manual_seed(1)):
            raise RuntimeError("on purpose")
        torch.rand(1)
        assert not torch.equal(torch.get_rng_state(), state)
    finally:
        torch.set_rng_state(state)


def test_initial_weights_inside_of_own_randomness_still_learn() -> None:
    with own_randomness(torch.Generator().manual_seed(1)):
        layer = nn.Linear(3, 2)
    layer(torch.ones(4, 3)).sum().backward()
    assert layer.weight.grad is not None


def entropy(sequence: np.random.SeedSequence) -> list[int]:
    return sequence.generate_state(4).tolist()


@pytest.mark.parametrize("seed", [0, 7, np.int64(7), 2**40])
def test_an_int_gives_the_same_sequence_every_time(seed: int) -> None:
    assert entropy(seed_sequence(seed)) == entropy(seed_sequence(int(seed)))
    assert entropy(seed_sequence(seed)) != entropy(seed_sequence(seed + 1))


@pytest.mark.parametrize("make", [np.random.RandomState, np.random.default_rng])
def test_an_instance_is_advanced_by_one_draw(make: Callable[[int], np.random.RandomState]) -> None:
    first, second, fresh = make(3), make(3), make(3)
    one, two = entropy(seed_sequence(first)), entropy(seed_sequence(first))
    assert one != two
    assert [entropy(seed_sequence(second)) for _ in range(2)] == [one, two]
    draw = fresh.randint if isinstance(fresh, np.random.RandomState) else fresh.integers
    for _ in range(2):
        draw(np.iinfo(np.int32).max if isinstance(fresh, np.random.RandomState) else np.iinfo(np.int64).max)
    assert first.uniform() == fresh.uniform()


@pytest.mark.parametrize("random_state", [None, 5, np.random.RandomState(5), np.random.default_rng(5)])
def test_the_global_generator_of_numpy_is_left_alone(random_state: object) -> None:
    before = np.random.get_state(legacy=False)
    sequence = seed_sequence(random_state)  # type: ignore[arg-type]
    after = np.random.get_state(legacy=False)
    assert isinstance(sequence, np.random.SeedSequence)
    assert before["state"]["pos"] == after["state"]["pos"]
    np.testing.assert_array_equal(before["state"]["key"], after["state"]["key"])


def test_none_takes_fresh_entropy() -> None:
    assert entropy(seed_sequence(None)) != entropy(seed_sequence(None))


def test_generators_follow_their_sequence() -> None:
    before = torch.get_rng_state()
    first, second, other = (torch.rand(3, generator=torch_generator(seed_sequence(seed))) for seed in (1, 1, 2))
    assert torch.equal(first, second) and not torch.equal(first, other)
    children = [torch.rand(3, generator=torch_generator(child)) for child in seed_sequence(1).spawn(2)]
    assert not torch.equal(*children)
    assert torch.equal(torch.get_rng_state(), before)
