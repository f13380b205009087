import hashlib
from itertools import islice

import pytest
import torch
import torch.distributed as dist

from qdm_lightning.data.module import ImageDataModule, StepBatches
from qdm_lightning.data.spec import DigitsConfig


def numbered(count):
    return torch.arange(count, dtype=torch.uint8).reshape(count, 1, 1, 1)


class Fixed(ImageDataModule):
    def __init__(self, train, val, batch_size=2):
        super().__init__(DigitsConfig(batch_size=batch_size), channels=1, image_size=1)
        self.arrays = train, val
        self.loads = 0

    def load(self):
        self.loads += 1
        return self.arrays


@pytest.mark.parametrize(("count", "batch"), [(7, 3), (10, 5), (3, 8), (1, 4)])
def test_batches_run_through_each_epoch_exactly_once(count, batch):
    steps = StepBatches(numbered(count), batch_size=batch, seed=0)
    stream = torch.cat(list(islice(steps, 2 * count))).flatten()
    assert len(stream) == 2 * count * batch
    for epoch in stream.split(count)[: 2 * batch]:
        assert sorted(epoch.tolist()) == list(range(count))


def test_a_resumed_run_sees_the_batches_of_an_uninterrupted_one():
    whole = list(islice(StepBatches(numbered(11), batch_size=4, seed=3), 20))
    for start in (0, 1, 5, 13):
        resumed = list(islice(StepBatches(numbered(11), batch_size=4, seed=3, start_step=start), 20 - start))
        assert all(torch.equal(a, b) for a, b in zip(whole[start:], resumed, strict=True))


def test_steps_asked_for_out_of_order_are_the_same():
    steps = StepBatches(numbered(11), batch_size=4, seed=3)
    forward = [steps.indices(k) for k in range(20)]
    assert all(torch.equal(steps.indices(k), forward[k]) for k in reversed(range(20)))


def test_seed_and_epoch_both_change_the_order():
    first, second = StepBatches(numbered(50), batch_size=50, seed=0), StepBatches(numbered(50), batch_size=50, seed=1)
    assert not torch.equal(first.indices(0), second.indices(0))
    assert not torch.equal(first.indices(0), first.indices(1))
    assert not torch.equal(first.indices(1), second.indices(0))


def test_the_global_random_state_is_neither_read_nor_moved():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = next(iter(StepBatches(numbered(9), batch_size=9, seed=0)))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(next(iter(StepBatches(numbered(9), batch_size=9, seed=0))), first)


def test_ranks_share_a_batch_without_overlap(monkeypatch):
    whole = next(iter(StepBatches(numbered(12), batch_size=6, seed=0)))
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 3)
    parts = []
    for rank in range(3):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        parts.append(next(iter(StepBatches(numbered(12), batch_size=6, seed=0))))
    assert torch.equal(torch.cat(parts), whole)
    with pytest.raises(ValueError, match=r"data\.batch_size=4 .* 3 devices: .* data\.batch_size=3$"):
        next(iter(StepBatches(numbered(12), batch_size=4, seed=0)))


def test_module_loads_once_and_hands_over_seed_and_start():
    data = Fixed(numbered(5), numbered(2))
    with pytest.raises(RuntimeError, match="setup"):
        _ = data.train_images
    data.setup("fit")
    data.setup()
    assert data.loads == 1
    data.seed, data.start_step = 4, 3
    expected = StepBatches(numbered(5), batch_size=2, seed=4).indices(3)
    assert torch.equal(next(iter(data.train_dataloader())).flatten(), expected.to(torch.uint8))


def test_data_without_labels_say_so_and_batches_carry_those_of_their_images():
    data = Fixed(numbered(5), numbered(2))
    data.setup()
    data.labelled = True
    with pytest.raises(ValueError, match=r"Fixed has no labels: take a network without classes, model\.num_class_embeds=null"):
        data.train_dataloader()
    batches = StepBatches(numbered(5), batch_size=3, seed=1, labels=torch.arange(5) + 10)
    for images, labels in islice(batches, 4):
        assert torch.equal(images.flatten() + 10, labels)


def test_fingerprint_is_the_documented_hash_and_sees_every_part():
    def fingerprint(train, val):
        data = Fixed(train, val)
        data.setup()
        return data.fingerprint()

    train, val = numbered(5), numbered(2)
    by_hand = hashlib.sha256(b"(5, 1, 1, 1)" + bytes(range(5)) + b"(2, 1, 1, 1)" + bytes(range(2))).hexdigest()
    assert fingerprint(train, val) == by_hand
    others = [(train.flip(0), val), (train, val.flip(0)), (train[:4], val), (train.reshape(1, 1, 5, 1), val)]
    assert len({by_hand, *(fingerprint(*other) for other in others)}) == 5
