"""I3D against the same network written otherwise, and the files that its weights come in."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Mapping
from pathlib import Path

import i3d_oracle as oracle
import pytest
import torch
from torch import Tensor, nn

from vdm.errors import UserError
from vdm.metrics import i3d_files
from vdm.metrics.i3d import I3D, load_i3d, max_pool_same, pad_same

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated:FutureWarning")

State = dict[str, Tensor]


def pixels(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


class Named(nn.Module):
    """A state dict as a module of nested modules, which TorchScript can save."""

    def __init__(self, state: Mapping[str, Tensor]):
        super().__init__()
        below: dict[str, dict[str, Tensor]] = {}
        for name, tensor in state.items():
            first, _, rest = name.partition(".")
            if rest:
                below.setdefault(first, {})[rest] = tensor
            else:
                self.register_buffer(first, tensor)
        for first, inner in below.items():
            self.add_module(first, Named(inner))

    def forward(self, x: Tensor, rescale: bool = False) -> Tensor:
        return x


@pytest.fixture(scope="module")
def state() -> State:
    return oracle.weights()


@pytest.fixture(scope="module")
def files(state: State, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same weights as each project would have written them."""
    folder = tmp_path_factory.mktemp("i3d")
    old = {name: tensor for name, tensor in oracle.piergiaj(state).items() if oracle.COUNTER not in name}
    assert len(old) == 287 and len(oracle.piergiaj(state)) == 344
    torch.save(old, folder / "rgb_imagenet.pt", _use_new_zipfile_serialization=False)
    torch.save(oracle.piergiaj(state), folder / "i3d_pretrained_400.pt")
    torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}, folder / "model_rgb.pth")
    torch.jit.script(Named(state)).save(str(folder / "i3d_torchscript.pt"))
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture(scope="module")
def net(files: dict[str, Path]) -> I3D:
    return load_i3d(files["i3d_pretrained_400.pt"]).net


# The network


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "before", "after"),
    [(224, 7, 2, 2, 3), (9, 7, 2, 3, 3), (112, 3, 2, 0, 1), (7, 3, 2, 1, 1), (5, 3, 1, 1, 1), (5, 2, 2, 0, 1),
     (4, 2, 2, 0, 0), (8, 1, 1, 0, 0), (3, 1, 2, 0, 0)],
)  # fmt: skip
def test_same_padding_by_hand(size: int, kernel: int, stride: int, before: int, after: int) -> None:
    ones = torch.ones(1, 1, size, 1, 1)
    padded = pad_same(ones, kernel=(kernel, 1, 1), stride=(stride, 1, 1)).flatten().tolist()
    assert padded == [0.0] * before + [1.0] * size + [0.0] * after
    across = pad_same(ones.transpose(2, 4), kernel=(1, 1, kernel), stride=(1, 1, stride))
    assert across.flatten().tolist() == padded, "each axis by its own size"


def test_a_pool_that_is_padded_sees_no_border() -> None:
    x = pixels(1, 2, 5, 6, 7).abs()
    kernel, stride = (3, 3, 3), (2, 2, 2)
    padded = nn.functional.pad(x, (1, 1, 0, 1, 1, 1), value=-1.0)
    torch.testing.assert_close(max_pool_same(x, kernel=kernel, stride=stride), nn.functional.max_pool3d(padded, 3, 2))


def test_sizes() -> None:
    net = I3D()
    assert sum(parameter.numel() for parameter in net.parameters()) == 12_697_264
    assert sum(isinstance(module, nn.BatchNorm3d) for module in net.modules()) == 57
    assert len(net.state_dict()) == 344
    assert not any(parameter.requires_grad for parameter in net.parameters())


@pytest.mark.parametrize("shape", [(16, 64, 64), (9, 33, 50), (13, 71, 40)])
def test_every_layer_against_the_other_writing(net: I3D, state: State, shape: tuple[int, int, int]) -> None:
    video = pixels(2, 3, *shape, seed=shape[0])
    expected = oracle.maps(state, video)
    assert expected.std() > 0.1, "numbers have not died out"
    torch.testing.assert_close(net.maps(video), expected, atol=1e-4, rtol=1e-4)


def test_the_comparison_can_fail(net: I3D, state: State) -> None:
    """One frame more is another padding, and makes other numbers."""
    video = pixels(1, 3, 16, 64, 64)
    shifted = torch.cat([video[:, :, :1] * 0, video], dim=2)
    assert (net.maps(shifted)[:, :, :2] - oracle.maps(state, video)).abs().max() > 0.1


def test_epsilon(files: dict[str, Path], state: State) -> None:
    video = pixels(1, 3, 9, 40, 40)
    other = load_i3d(files["i3d_pretrained_400.pt"], bn_eps=1e-5).net
    expected = oracle.maps(state, video, eps=1e-5)
    torch.testing.assert_close(other.maps(video), expected, atol=1e-4, rtol=1e-4)
    assert (expected - oracle.maps(state, video, eps=1e-3)).abs().max() > 1e-3


def test_logits_are_a_mean_over_time(net: I3D, state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    maps = pixels(2, 1024, 4, 7, 7).abs()
    monkeypatch.setattr(net, "maps", lambda video: maps)  # what comes before takes seconds
    found = net(torch.zeros(2, 3, 25, 224, 224))
    assert found.shape == (2, 400)
    torch.testing.assert_close(found, oracle.head(state, maps), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_the_whole_network_against_the_other_writing(net: I3D, state: State) -> None:
    video = pixels(1, 3, 17, 224, 224)
    torch.testing.assert_close(net(video), oracle.head(state, oracle.maps(state, video)), atol=1e-4, rtol=1e-4)


def test_training_mode_changes_nothing(net: I3D) -> None:
    video = pixels(2, 3, 9, 40, 40)
    expected = net.maps(video)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    try:
        assert torch.equal(net.train().maps(video), expected)
    finally:
        net.eval()
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())


@pytest.mark.parametrize(("frames", "steps"), [(8, 0), (9, 1), (16, 1), (17, 2), (24, 2), (25, 3), (32, 3), (128, 15)])
def test_steps_of_time(net: I3D, frames: int, steps: int) -> None:
    """The last pool, which takes two at a time, makes n + 1 into n."""
    assert net.maps(pixels(1, 3, frames, 32, 32)).shape == (1, 1024, steps + 1, 1, 1)


def test_the_other_layer_is_what_logits_are_made_of(net: I3D, state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    maps = pixels(2, 1024, 3, 7, 7, seed=1).abs()
    monkeypatch.setattr(net, "maps", lambda video: maps)
    pooled = net.features(torch.zeros(2, 3, 17, 224, 224), layer="pool1024")
    expected = maps.mean((3, 4)).unfold(2, 2, 1).mean((2, 3))
    torch.testing.assert_close(pooled, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.slow
def test_one_by_one_or_seven_at_once(net: I3D) -> None:
    videos = pixels(7, 3, 9, 224, 224)
    alone = torch.cat([net(video[None]) for video in videos])
    torch.testing.assert_close(net(videos), alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ((1, 3, 8, 224, 224), "9 frames or more, not 8"),
        ((1, 3, 16, 256, 256), r"takes \(B, 3, T, 224, 224\)"),
        ((1, 3, 16, 224, 223), r"takes \(B, 3, T, 224, 224\)"),
        ((1, 16, 3, 224, 224), r"takes \(B, 3, T, 224, 224\)"),
        ((3, 16, 224, 224), r"takes \(B, 3, T, 224, 224\)"),
    ],
)
def test_other_shapes_are_refused(net: I3D, shape: tuple[int, ...], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        net(torch.zeros(shape))


def test_low_precision_is_refused(net: I3D) -> None:
    with pytest.raises(ValueError, match="float32, not torch.bfloat16"):
        net(torch.zeros(1, 3, 9, 224, 224, dtype=torch.bfloat16))


# Files


@pytest.mark.parametrize(
    ("name", "metric"),
    [
        ("i3d_pretrained_400.pt", "fvd"),
        ("i3d_torchscript.pt", "fvd"),
        ("rgb_imagenet.pt", "fvd_i3d_imagenet"),
        ("model_rgb.pth", "fvd_i3d_imagenet"),
    ],
)
def test_every_naming_is_the_same_network(
    files: dict[str, Path], state: State, net: I3D, name: str, metric: str
) -> None:
    loaded = load_i3d(files[name])
    assert loaded.metric == metric
    assert loaded.sha256 == hashlib.sha256(files[name].read_bytes()).hexdigest()
    assert str(files[name]) in loaded.warning, "these are not the published files, and that is said"
    video = pixels(1, 3, 9, 33, 40)
    assert torch.equal(loaded.net.maps(video), net.maps(video))
    for part, tensor in oracle.piergiaj(state).items():
        if oracle.COUNTER not in part:
            assert torch.equal(loaded.net.state_dict()[part], tensor), part


def test_a_name_that_says_nothing_is_not_guessed_at(light: State, tmp_path: Path) -> None:
    path = tmp_path / "my_i3d_pretrained_400.pt"
    torch.save(light, path)
    with pytest.raises(UserError, match="its name does not say whose weights") as error:
        load_i3d(path)
    assert str(path) in str(error.value)


def test_the_bytes_of_a_published_file_say_more_than_its_name(
    light: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    misnamed = tmp_path / "i3d_pretrained_400.pt"
    torch.save(light, misnamed)
    content = misnamed.read_bytes()
    assert load_i3d(misnamed).metric == "fvd"
    for key in (hashlib.sha1(f"blob {len(content)}\0".encode() + content), hashlib.sha256(content)):
        monkeypatch.setattr(i3d_files, "_PUBLISHED", {key.hexdigest(): i3d_files.IMAGENET})
        loaded = load_i3d(misnamed)
        assert (loaded.metric, loaded.warning) == ("fvd_i3d_imagenet", "")


def test_names_of_files_in_git(tmp_path: Path) -> None:
    """What `git hash-object` prints for these two, everywhere."""
    for content, name in ((b"", "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"),
                          (b"hello\n", "ce013625030ba8dba906f756967f9e9ca394464a")):  # fmt: skip
        (tmp_path / "file").write_bytes(content)
        assert i3d_files.git_id(tmp_path / "file") == name


@pytest.fixture(scope="module")
def light(state: State) -> State:
    """An I3D of zeros by piergiaj's names, whose file is small, for the shapes are views of one number."""
    return {name: torch.zeros(()).expand(tensor.shape) for name, tensor in oracle.piergiaj(state).items()}


@pytest.mark.parametrize(
    ("file", "name", "tensor", "reason"),
    [
        (
            "rgb_charades.pt",
            "logits.conv3d.weight",
            torch.zeros(157, 1024, 1, 1, 1),
            "of 157 classes (as rgb_charades.pt",
        ),
        ("i3d_600.pt", "logits.conv3d.weight", torch.zeros(600, 1024, 1, 1, 1), "of 600 classes, not of Kinetics-400"),
        ("flow_imagenet.pt", "Conv3d_1a_7x7.conv3d.weight", torch.zeros(64, 2, 7, 7, 7), "of 2 channels"),
        (
            "rgb_imagenet.pt",
            "Conv3d_1a_7x7.conv3d.weight",
            None,
            "is no I3D, for it has no Conv3d_1a_7x7.conv3d.weight",
        ),
        ("rgb_imagenet.pt", "Mixed_4d.b1b.bn.bias", None, "it lacks Mixed_4d.b1b.bn.bias"),
        ("rgb_imagenet.pt", "Mixed_6a.b0.bn.bias", torch.zeros(1), "it has also Mixed_6a.b0.bn.bias"),
        ("rgb_imagenet.pt", "Mixed_3b.b0.bn.bias", torch.zeros(63), "Mixed_3b.b0.bn.bias is (63,), not (64,)"),
        ("rgb_imagenet.pt", "Mixed_3b.b0.bn.bias", torch.zeros(64).long(), "is damaged: Mixed_3b.b0.bn.bias"),
        ("rgb_imagenet.pt", "Mixed_3b.b0.bn.bias", torch.full((64,), torch.nan), "is damaged: Mixed_3b.b0.bn.bias"),
    ],
)
def test_other_files_are_refused_by_what_they_are(
    light: State, tmp_path: Path, file: str, name: str, tensor: Tensor | None, reason: str
) -> None:
    path, changed = tmp_path / file, dict(light)
    if tensor is None:
        del changed[name]
    else:
        changed[name] = tensor
    torch.save(changed, path)
    with pytest.raises(UserError) as error:
        load_i3d(path)
    assert str(error.value).startswith(str(path)) and reason in str(error.value), error.value


class Bomb:
    """What a hostile pickle asks for."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("raise SystemExit('the pickle was run')",)


def test_no_pickle_is_run_and_what_is_no_file_is_named(files: dict[str, Path], tmp_path: Path) -> None:
    bomb, cut, script, shell, missing = (tmp_path / f"i3d_torchscript{i}.pt" for i in range(5))
    torch.save({"Conv3d_1a_7x7.conv3d.weight": Bomb()}, bomb)
    cut.write_bytes(files["i3d_torchscript.pt"].read_bytes()[:1000])
    torch.jit.script(Named({"a.b": torch.zeros(1)})).save(str(script))
    with zipfile.ZipFile(shell, "w") as archive:
        archive.writestr("i3d/constants.pkl", b"no constants")
    for path, reason in (
        (bomb, "pickle"),
        (cut, "cannot be read"),
        (script, "is no I3D"),
        (shell, "cannot be read as TorchScript"),
        (missing, "does not exist"),
    ):
        with pytest.raises(UserError, match=reason) as error:
            load_i3d(path)
        assert str(path) in str(error.value)
