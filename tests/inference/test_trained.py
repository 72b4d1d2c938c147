"""What rounded weights cost a model that has been trained, on real images: scikit-learn's digits."""

import pytest
import timm
import torch
import torch.nn.functional as F

import timm_qkformer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


def digits():
    """Training images and labels, held-out images and labels: scans of 8x8 pixels as [N, 1, 32, 32]."""
    datasets = pytest.importorskip("sklearn.datasets")
    from sklearn.model_selection import train_test_split

    scans, labels = datasets.load_digits(return_X_y=True)
    x = torch.tensor(scans, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    x = F.interpolate(x, size=(32, 32), mode="bilinear").sub(0.3).div(0.35)
    y = torch.tensor(labels)
    train, test = train_test_split(range(len(y)), test_size=0.2, random_state=0, stratify=y)
    return x[train], y[train], x[test], y[test]


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    x, y, *held_out = digits()
    model = timm.create_model("test_qkformer", in_chans=1, num_classes=10, depths=(1, 1, 1))
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.02)
    batches = [part for _ in range(6) for part in torch.randperm(len(x)).split(64)]
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=len(batches))
    for part in batches:
        optimizer.zero_grad()
        F.cross_entropy(model(x[part]), y[part], label_smoothing=0.1).backward()
        optimizer.step()
        scheduler.step()
    return model.eval(), *held_out


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
@torch.inference_mode()
def test_answers_as_the_plain_model(trained, precision, capsys):
    model, images, labels = trained
    features = model.forward_features(images)
    answers = model.forward_head(features).argmax(1)
    deployed = timm_qkformer.deploy(model, precision)
    found = deployed.forward_features(images)
    similarity = F.cosine_similarity(found.flatten(), features.flatten(), 0).item()
    same = (deployed.forward_head(found).argmax(1) == answers).float().mean().item()
    accuracy = (answers == labels).float().mean().item()
    with capsys.disabled():
        print(
            f"\n{precision}: cosine similarity {similarity:.5f}, same top-1 {same:.2%}, plain accuracy {accuracy:.2%}"
        )
    assert accuracy > 0.9  # it has learned
    assert similarity > 0.99
    assert same >= 0.98
