"""A network of your own, in a loop of your own, taught by a store.

`preceptor train` takes any timm backbone. This takes any network: what it needs of preceptor are
the store's batches, joined with the images' pixels, and an alignment. After `make demo`:

    .venv/bin/python -m preceptor.examples.own_network --steps 300 \\
        --cache outputs/demo/store-train --shards 'examples/data/fashion-mnist/train-*.tar.gz' \\
        --test-cache outputs/demo/store-test \\
        --test-shards 'examples/data/fashion-mnist/test-*.tar.gz'
"""

from __future__ import annotations

import argparse
import json
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save
from torch import Tensor, nn

from ..cache import Cache
from ..cache.samples import SampleIndex
from ..errors import ConfigError
from ..train.alignment import Alignment, build_alignment
from ..train.batch import normalise, to_device
from ..train.data import TrainData
from ..train.evaluation import Classes, Features, Score, build_suite
from ..train.students import StudentOutput
from ..train.views import StoredViews

SIZE = (64, 64)
"""Height and width of the network's input, in pixels; the teachers had their own."""


class OwnNetwork(nn.Module):
    """A plain CNN that knows nothing of preceptor: images [B, 3, H, W] to a map [B, 64, H/8, W/8].

    Put your own in its place.
    """

    width = 64

    def __init__(self) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        for before, after in ((3, 16), (16, 32), (32, self.width)):
            blocks += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.BatchNorm2d(after)]
            blocks += [nn.GELU()]
        self.layers = nn.Sequential(*blocks)

    def forward(self, images: Tensor) -> Tensor:
        found: Tensor = self.layers(images)
        return found


class AsStudent(nn.Module):
    """What an alignment reads of a network: the tokens of a map, and one feature an image.

    `model_token` (after the backbone), `regression`, `relational` and `attention_pool` need no
    more. The others read depths or hide patches, which `preceptor.train.students.Student` can do.
    """

    stages = ()  # no depths to be read or written
    patch_dim = None  # no patches to be masked

    def __init__(self, network: OwnNetwork) -> None:
        super().__init__()
        self.network = network
        with torch.no_grad():
            output = self(torch.zeros(1, 3, *SIZE))
        self.grid = output.grid
        self.token_dim, self.pooled_dim = output.tokens.shape[-1], output.pooled.shape[-1]

    def forward(self, pixels: Tensor, **asked: Any) -> StudentOutput:
        """Normalised images [B, 3, H, W] to tokens [B, N, C] and a feature [B, C].

        Raises:
            ConfigError: an alignment asks for more than that.
        """
        if wanted := [name for name, value in asked.items() if value is not None]:
            raise ConfigError(
                f"a network of one's own does not know {', '.join(wanted)}: choose another "
                "alignment"
            )
        found = self.network(pixels)
        return StudentOutput(
            tokens=found.flatten(2).transpose(1, 2),
            grid=(found.shape[2], found.shape[3]),
            pooled=found.mean((2, 3)),
        )


def teach(
    student: AsStudent,
    alignment: Alignment,
    data: TrainData,
    steps: int,
    device: torch.device,
    learning_rate: float = 3e-3,
) -> list[float]:
    """Train both for some steps; the loss of every step."""
    both = nn.ModuleList([student, alignment]).to(device).train()
    optimizer = torch.optim.AdamW(both.parameters(), lr=learning_rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    losses = []
    with closing(data.batches(0, steps)) as batches:  # goes on after a break: batches(done, steps)
        for batch in batches:
            pixels, targets = to_device(batch, device)
            output = alignment(alignment.run_student(student, pixels), targets)
            optimizer.zero_grad()
            output.loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(float(output.loss.detach()))
            if len(losses) % 50 == 0:
                print(f"step {len(losses)} of {steps}: loss {losses[-1]:.3f}", flush=True)
    return losses


Side = tuple[Cache, StoredViews]
"""A store and the pixels of its rows."""


@torch.no_grad()
def features(student: AsStudent, side: Side, device: torch.device) -> NDArray[np.float32]:
    """The pooled feature of every row that has tokens, float32 [n, C]."""
    student.eval()
    cache, views = side
    rows = np.flatnonzero(cache.valid)
    found = [
        student(normalise(views.__getitems__(part.tolist()), device)).pooled.float().cpu()
        for part in np.array_split(rows, -(-len(rows) // 256))
    ]
    return torch.cat(found).numpy()


def judge(student: AsStudent, train: Side, test: Side, device: torch.device) -> list[Score]:
    """k-NN and a linear probe of the pooled feature, by the protocols of `preceptor eval`."""
    found = Features(features(student, train, device), features(student, test, device))
    known = [cache.labels[cache.valid] for cache, _ in (train, test)]
    labels = Classes("class", train=known[0], test=known[1])
    suite = build_suite(["knn", "linear"])
    suite.check([labels])
    return suite.score(found, [labels])


def opened(location: str, shards: str) -> Side:
    """A store, joined by key with its images."""
    cache = Cache.open(location)
    return cache, StoredViews(cache, SampleIndex.from_shards(shards), SIZE)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Train, judge, and save the network's weights and a summary."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name in ("cache", "shards", "test-cache", "test-shards"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--align", default="regression")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path("outputs/own_network"))
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    train = cache, views = opened(options.cache, options.shards)
    test = opened(options.test_cache, options.test_shards)
    torch.manual_seed(0)
    student = AsStudent(OwnNetwork())
    spaces = {name: space.spec for name, space in cache.spaces.items()}
    alignment = build_alignment({"method": options.align}, student, spaces, cache.__getitem__)
    data = TrainData(cache, views, alignment.required_spaces, options.batch)
    losses = teach(student, alignment, data, options.steps, device)

    options.out.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.cpu() for name, tensor in student.network.state_dict().items()}
    # Not save_file, whose files nobody else may read.
    (options.out / "network.safetensors").write_bytes(save(weights))
    scores = judge(student, train, test, device)
    for score in scores:
        print(f"{score.key}: {score.metric} {score.value:.3f} [{score.low:.3f}, {score.high:.3f}]")
    summary = {
        "loss": {"first": losses[0], "last": losses[-1]},
        "scores": {score.key: score.value for score in scores},
    }
    (options.out / "summary.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
    return summary


if __name__ == "__main__":
    main()
