"""Three facts that make the generated world worth learning, each with the margin seen here.

Colour does not tell the class, an untrained network tells little, a trained one nearly everything.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision

from firstsight.sources.scenes import Scenes

pytestmark = pytest.mark.slow
CHANCE = 10.0


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setenv("FIRSTSIGHT_CACHE", str(tmp_path_factory.mktemp("cache")))
    yield tuple(
        (np.stack([source.pixels(i) for i in range(len(source))]), torch.tensor(source.labels))
        for source in (Scenes("train"), Scenes("test"))
    )
    patch.undo()


def at_64(pixels):
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    return (F.interpolate(images, 64, mode="bilinear", antialias=True) - 0.5) / 0.25


def accuracy(predicted, labels):
    return 100 * (predicted == labels).float().mean().item()


def neighbours_vote(similarity, labels, weigh):
    near, index = similarity.topk(20)
    votes = torch.zeros(len(similarity), 10)
    return votes.scatter_add_(1, labels[index], weigh(near)).argmax(1)


@pytest.mark.parametrize("metric", ["cosine", "L1"])
def test_colour_does_not_tell_the_class(splits, metric):
    def histograms(pixels):
        bins = (pixels >> 5).astype(np.int64).reshape(len(pixels), -1, 3) @ (64, 8, 1)
        return torch.tensor(np.stack([np.bincount(row, minlength=512) for row in bins])).float()

    (train, train_labels), (test, test_labels) = splits
    a, b = histograms(test), histograms(train)
    similarity = F.normalize(a) @ F.normalize(b).T if metric == "cosine" else -torch.cdist(a, b, 1)
    figure = accuracy(neighbours_vote(similarity, train_labels, torch.ones_like), test_labels)
    print(f"colour histograms, {metric}: {figure:.1f} %")
    assert figure <= CHANCE + 5


@torch.no_grad()
def test_an_untrained_network_tells_little(splits):
    torch.manual_seed(0)
    network = torchvision.models.resnet18()
    network.fc = torch.nn.Identity()
    network.eval()
    features = [
        F.normalize(torch.cat([network(batch) for batch in at_64(pixels).split(250)]))
        for pixels, _ in splits
    ]
    votes = neighbours_vote(features[1] @ features[0].T, splits[0][1], lambda s: (s / 0.07).exp())
    figure = accuracy(votes, splits[1][1])
    print(f"untrained ResNet-18: {figure:.1f} %")
    assert figure <= 45


def test_a_supervised_network_tells_nearly_everything(splits):
    torch.manual_seed(0)
    images, labels = F.pad(at_64(splits[0][0]), (6, 6, 6, 6), mode="reflect"), splits[0][1]
    network = torchvision.models.resnet18(num_classes=10).to(memory_format=torch.channels_last)
    epochs, batch = 8, 64
    steps = epochs * (len(images) // batch)
    optimiser = torch.optim.AdamW(network.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps)
    bfloat16 = torch.autocast("cpu", torch.bfloat16, enabled=torch.cpu._is_avx512_bf16_supported())
    for _ in range(epochs):
        for index in torch.randperm(len(images)).split(batch)[: steps // epochs]:
            top, left = torch.randint(13, (2,)).tolist()
            views = images[index, :, top : top + 64, left : left + 64]
            flipped = torch.rand(batch) < 0.5
            views[flipped] = views[flipped].flip(-1)
            with bfloat16:
                scores = network(views.to(memory_format=torch.channels_last))
            optimiser.zero_grad()
            F.cross_entropy(scores.float(), labels[index], label_smoothing=0.1).backward()
            optimiser.step()
            schedule.step()
    network.eval()
    with torch.no_grad():
        predicted = torch.cat([network(part).argmax(1) for part in at_64(splits[1][0]).split(250)])
    figure = accuracy(predicted, splits[1][1])
    print(f"supervised ResNet-18: {figure:.1f} %")
    assert figure >= 90
