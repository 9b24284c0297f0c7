"""Modules of torch.nn train like eager: outputs, gradients and buffers, over calls with other data."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import thunder
from tests.jit_checks import nothing_leaks  # noqa: F401
from tests.train_checks import (
    assert_refused_clearly,
    check_training,
    leaf,
    weighted_sum,
    x,
)

pytestmark = pytest.mark.filterwarnings("ignore::thunder.ThunderWarning")


def made(make):
    torch.manual_seed(0)
    return make().train()


class Recurrent(nn.Module):
    """Only the outputs of a recurrent layer, and its last state."""

    def __init__(self, kind, **options):
        super().__init__()
        self.layer = getattr(nn, kind)(3, 4, **options)
        self.head = nn.Linear(self.layer.hidden_size * (2 if self.layer.bidirectional else 1), 2)

    def forward(self, a, state=None):
        out, state = self.layer(a, state)
        return self.head(out), state


class Attention(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.layer = nn.MultiheadAttention(8, 2, batch_first=True, **options)

    def forward(self, a, mask=None, padding=None):
        return self.layer(a, a, a, attn_mask=mask, key_padding_mask=padding, need_weights=mask is None)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, a):
        return (a + self.norm(self.conv(a))).relu()


CASES = {
    "mlp": (lambda: nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)), leaf(4, 3)),
    "mlp_with_dropout": (lambda: nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 2)), leaf(4, 3)),
    "bilinear": (lambda: nn.Bilinear(3, 3, 2), leaf(4, 3), leaf(4, 3)),
    "prelu": (lambda: nn.Sequential(nn.Linear(3, 4), nn.PReLU(4)), leaf(4, 3)),
    "glu": (lambda: nn.Sequential(nn.Linear(3, 8), nn.GLU()), leaf(4, 3)),
    "conv_and_batch_norm": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        leaf(2, 3, 8, 8),
    ),
    "residual": (lambda: nn.Sequential(Residual(), Residual(), nn.AdaptiveAvgPool2d(1)), leaf(2, 4, 6, 6)),
    "conv1d_grouped": (lambda: nn.Conv1d(4, 8, 3, groups=2, stride=2, padding=1), leaf(2, 4, 9)),
    "conv_transposed": (lambda: nn.ConvTranspose2d(3, 4, 3, stride=2), leaf(2, 3, 4, 4)),
    "conv_and_group_norm": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.SiLU()), leaf(2, 3, 6, 6)),
    "instance_norm": (lambda: nn.InstanceNorm1d(3, affine=True, track_running_stats=True), leaf(2, 3, 5)),
    "layer_norm": (lambda: nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 2)), leaf(4, 3)),
    "rms_norm": (lambda: nn.RMSNorm(3), leaf(4, 3)),
    "transformer_encoder_layer": (
        lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True),
        leaf(2, 5, 8),
    ),
    "transformer_encoder_layer_norm_first": (
        lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, norm_first=True, activation="gelu", batch_first=True),
        leaf(2, 5, 8),
    ),
    "transformer": (lambda: nn.Transformer(8, 2, 1, 1, 16, 0.0, batch_first=True), leaf(2, 5, 8), leaf(2, 4, 8)),
    "attention": (Attention, leaf(2, 5, 8)),
    "attention_with_mask": (Attention, leaf(2, 5, 8), torch.triu(torch.ones(5, 5, dtype=torch.bool), 1)),
    "attention_with_float_mask": (lambda: Attention(dropout=0.1), leaf(2, 5, 8), -1e4 * torch.ones(5, 5).triu(1)),
    "lstm": (lambda: Recurrent("LSTM"), leaf(5, 2, 3)),
    "lstm_deep_bidirectional": (lambda: Recurrent("LSTM", num_layers=2, bidirectional=True), leaf(5, 2, 3)),
    "lstm_with_state": (lambda: Recurrent("LSTM"), leaf(5, 2, 3), (leaf(1, 2, 4), leaf(1, 2, 4))),
    "lstm_with_projection": (lambda: nn.LSTM(3, 4, proj_size=2), leaf(5, 2, 3)),
    "gru": (lambda: Recurrent("GRU", batch_first=True), leaf(2, 5, 3)),
    "gru_with_dropout": (lambda: Recurrent("GRU", num_layers=2, dropout=0.5), leaf(5, 2, 3)),
    "rnn": (lambda: Recurrent("RNN", nonlinearity="relu"), leaf(5, 2, 3)),
    "lstm_cell": (lambda: nn.LSTMCell(3, 4), leaf(2, 3)),
    "embedding": (lambda: nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 2)), torch.tensor([[1, 2, 2], [8, 0, 1]])),
    "embedding_with_padding": (lambda: nn.Embedding(9, 4, padding_idx=2), torch.tensor([[1, 2, 2], [8, 0, 1]])),
    "embedding_scaled_by_frequency": (
        lambda: nn.Embedding(9, 4, scale_grad_by_freq=True),
        torch.tensor([[1, 2, 2], [8, 0, 1]]),
    ),
    "embedding_with_max_norm": (lambda: nn.Embedding(9, 4, max_norm=0.5), torch.tensor([[1, 2, 2], [8, 0, 1]])),
    "embedding_bag": (lambda: nn.EmbeddingBag(9, 4), torch.tensor([[1, 2, 2], [8, 0, 1]])),
    "pixel_shuffle": (lambda: nn.Sequential(nn.Conv2d(1, 4, 1), nn.PixelShuffle(2)), leaf(1, 1, 3, 3)),
    "cross_entropy": (nn.CrossEntropyLoss, leaf(4, 3), torch.tensor([0, 1, 2, 0])),
    "ctc": (
        nn.CTCLoss, leaf(6, 2, 4), torch.tensor([[1, 2], [3, 1]]), torch.tensor([6, 6]), torch.tensor([2, 1]),
    ),
    "triplet": (nn.TripletMarginLoss, leaf(4, 3), leaf(4, 3), x(4, 3).sin()),
}  # fmt: skip

# The parameter is changed in place by the forward itself: a clear refusal is as good.
# So it is where the values of tensors decide what runs.
REFUSABLE = {"embedding_with_max_norm", "ctc"}


@pytest.mark.parametrize("name", CASES)
def test_module_trains_like_eager(name):
    make, *args = CASES[name]
    check_training(made(make), *args, allow_refusal=name in REFUSABLE)


def test_padding_mask():
    padding = torch.tensor([[False, False, True, True, True], [False] * 5])
    check_training(made(Attention), leaf(2, 5, 8), padding=padding)


def test_sparse_embedding_is_right_or_refused():
    check_training(
        made(lambda: nn.Embedding(9, 4, sparse=True)), torch.tensor([[1, 2, 2], [8, 0, 1]]), allow_refusal=True
    )


def test_packed_sequences_are_right_or_refused():
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.LSTM(3, 4)

        def forward(self, a, lengths):
            packed = nn.utils.rnn.pack_padded_sequence(a, lengths)
            return nn.utils.rnn.pad_packed_sequence(self.layer(packed)[0])[0]

    check_training(made(Packed), leaf(5, 2, 3), torch.tensor([5, 3]), allow_refusal=True)


def test_lazy_modules_train_after_their_first_call():
    torch.manual_seed(0)
    net = nn.Sequential(nn.LazyLinear(4), nn.ReLU(), nn.LazyLinear(2))
    compiled = thunder.jit(net)
    for call in range(3):
        try:
            loss = weighted_sum(compiled(x(4, 3) + call))
        except thunder.CaptureError as error:
            assert_refused_clearly(error)
            return
        loss.backward()
    assert all(p.grad is not None for p in net.parameters())


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_batch_norm_modes(mode):
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    check_training(getattr(net, mode)(), leaf(4, 3))


def test_batch_norm_with_cumulative_average():
    """Its factor is the number of batches so far, read from a tensor."""
    check_training(made(lambda: nn.BatchNorm1d(3, momentum=None)), leaf(4, 3), misses=None, allow_refusal=True)


def test_bfloat16_module():
    net = made(lambda: nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 2))).bfloat16()
    check_training(net, x(4, 3).bfloat16().requires_grad_())


def test_float64_module():
    net = made(lambda: nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))).double()
    check_training(net, x(4, 3).double().requires_grad_())
