"""The photo transformer of `examples/photo_dit`."""

import itertools
import math
from pathlib import Path

import pytest
import torch

pytest.importorskip("safetensors")
pytest.importorskip("skimage")
pytest.importorskip("sklearn")

from examples.photo_dit import sampling
from examples.photo_dit.data import NAMES, PHOTOS, PhotoSet
from examples.photo_dit.model import DiTConfig, PhotoDiT, patch_centres, rotate
from examples.photo_dit.weights import WEIGHTS, load_model, origin, save_weights


def tiny(seed: int = 0) -> PhotoDiT:
    """A model whose zero-initialised layers are filled, so that every path matters."""
    torch.manual_seed(seed)
    model = PhotoDiT(DiTConfig(classes=3, width=64, depth=2, heads=2, mlp_width=96, grid=8))
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("side", [(16, 16), (8, 24), (20, 4)], ids=str)
def test_output_has_the_shape_of_the_input(side: tuple[int, int]) -> None:
    noisy = torch.randn(2, 3, *side)
    velocity = tiny()(noisy, torch.tensor([0.0, 1.0]), torch.tensor([0, 2]))
    assert velocity.shape == noisy.shape
    assert velocity.isfinite().all()


def test_every_condition_changes_the_output() -> None:
    model, noisy = tiny(), torch.randn(1, 3, 16, 16)
    time, label = torch.tensor([0.5]), torch.tensor([1])
    quarter = torch.tensor([[0.0, 0.0, 0.5, 0.5]])
    base = model(noisy, time, label)
    assert not torch.allclose(base, model(noisy, time, torch.tensor([2])))
    assert not torch.allclose(base, model(noisy, torch.tensor([0.6]), label))
    assert not torch.allclose(base, model(noisy, time, label, quarter))
    whole = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    torch.testing.assert_close(base, model(noisy, time, label, whole))


def test_samples_of_a_batch_do_not_mix() -> None:
    model, noisy = tiny(), torch.randn(2, 3, 16, 16)
    time, label = torch.tensor([0.2, 0.7]), torch.tensor([0, 1])
    together = model(noisy, time, label)
    alone = model(noisy[1:], time[1:], label[1:])
    torch.testing.assert_close(together[1:], alone)


def test_patches_and_pixels_are_inverses() -> None:
    model, pixels = tiny(), torch.randn(2, 3, 8, 20)
    patches = model._to_patches(pixels)
    torch.testing.assert_close(patches[1, 7, :4], pixels[1, 0, 4, 8:12])  # row 1, column 2
    torch.testing.assert_close(model._to_pixels(patches, 2, 5), pixels)


def test_a_window_has_the_positions_of_its_place_in_the_picture() -> None:
    whole = patch_centres(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), 8, 8).view(8, 8, 2)
    window = patch_centres(torch.tensor([[0.25, 0.5, 0.75, 1.0]]), 4, 4).view(4, 4, 2)
    torch.testing.assert_close(window, whole[2:6, 4:8])


def test_rotary_scores_depend_on_distance_alone() -> None:
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)
    frequencies = torch.logspace(0, -2, 4, dtype=torch.float64)

    def score(at_q: float, at_k: float) -> float:
        rotated = [
            rotate(x, (place * frequencies).cos(), (place * frequencies).sin())
            for x, place in ((q, at_q), (k, at_k))
        ]
        return (rotated[0] * rotated[1]).sum().item()

    assert math.isclose(score(3, 5), score(40, 42), rel_tol=1e-9)
    assert not math.isclose(score(3, 5), score(3, 6), rel_tol=1e-3)


def test_flow_ends_at_the_data_when_the_network_is_silent() -> None:
    """With a zero network the velocity is that of the best linear denoiser."""
    model = PhotoDiT(DiTConfig(classes=1, width=64, depth=1, heads=1, mlp_width=64, grid=4))
    noisy, label = torch.randn(1, 3, 16, 16), torch.tensor([0])
    at_start = model(noisy, torch.zeros(1), label)
    torch.testing.assert_close(at_start, -noisy)  # pure noise: go to the mean, zero
    at_end = model(noisy, torch.ones(1), label)
    torch.testing.assert_close(at_end, noisy)  # clean: the noise that is left out has mean zero


def test_weights_survive_the_file(tmp_path: Path) -> None:
    model = tiny()
    path = tmp_path / "weights.safetensors"
    save_weights(model.state_dict(), model.config, {"seed": 3}, path)
    loaded = load_model(path)
    assert loaded.config == model.config
    assert origin(path) == {"seed": 3}
    noisy, time, label = torch.randn(1, 3, 16, 16), torch.tensor([0.4]), torch.tensor([1])
    for parameter in model.parameters():
        parameter.copy_(parameter.half())
    torch.testing.assert_close(loaded(noisy, time, label), model(noisy, time, label))


def test_time_grid_runs_from_noise_to_picture() -> None:
    times = sampling.time_grid(10)
    assert (times[0], times[-1]) == (0.0, 1.0)
    steps = [b - a for a, b in itertools.pairwise(times)]
    assert steps == sorted(steps)  # the shift puts short steps where the noise is strong


def test_one_denoising_step_removes_noise_of_a_linear_flow() -> None:
    picture, start = torch.zeros(1, 3, 8, 8), sampling.noise(0, 8)
    halfway = sampling.euler_step(
        lambda x, t, label: picture - start, start, torch.tensor([0]), 0.0, 0.5
    )
    torch.testing.assert_close(halfway, start / 2)


@pytest.mark.parametrize("photo", PHOTOS, ids=NAMES)
def test_photo_is_found_in_its_package(photo: object) -> None:
    assert photo.path().is_file()  # type: ignore[attr-defined]


def test_windows_are_cut_where_their_view_says() -> None:
    photos = PhotoSet(grid=16, patch=4)
    assert photos.photos.shape == (len(PHOTOS), 3, 66, 66)
    batch = photos.batch(6, window=8, generator=torch.Generator().manual_seed(0))
    assert batch.pixels.shape == (6, 3, 32, 32)
    assert batch.pixels.abs().max() <= 1
    for pixels, label, view in zip(batch.pixels, batch.label, batch.view, strict=True):
        top, left = (view[:2] * 64).int().tolist()
        offsets = [(dy, dx) for dy in range(3) for dx in range(3)]
        source = photos.photos[label]
        assert any(
            torch.equal(pixels, source[:, top + dy : top + dy + 32, left + dx : left + dx + 32])
            for dy, dx in offsets
        )
        torch.testing.assert_close(view[2:] - view[:2], torch.tensor([0.5, 0.5]))


def test_shipped_weights_are_small_and_denoise_photographs() -> None:
    assert WEIGHTS.stat().st_size <= 12e6
    model = load_model()
    assert model.config.classes == len(PHOTOS)
    assert {"command", "seed", "steps", "loss"} <= origin().keys()
    clean = PhotoSet(grid=64, patch=4).photos[:, :, 68:196, 68:196]  # the middle, 32 x 32 patches
    view = torch.tensor((0.25, 0.25, 0.75, 0.75)).expand(len(PHOTOS), 4)
    label, t = torch.arange(len(PHOTOS)), 0.3
    time = torch.full((len(PHOTOS),), t)
    start = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    noisy = t * clean + (1 - t) * start

    def error(label: torch.Tensor) -> torch.Tensor:
        """Mean square error of each denoised picture, as a share of what the noise put there."""
        denoised = noisy + (1 - t) * model(noisy, time, label, view)
        return (denoised - clean).square().mean((1, 2, 3)) / ((1 - t) / t) ** 2

    right = error(label)
    assert (right < 0.015).all(), dict(zip(NAMES, right.tolist(), strict=True))
    assert (error(label.roll(1)) > 3 * right).all()
