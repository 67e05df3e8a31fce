"""The model zoo: real library classes in small random configurations, unmodified.

Each entry builds a model and one batch of inputs. Weights are the library's own initialisation.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Built = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Entry:
    """One model of the zoo.

    Args:
        name: in the table.
        library: whose class it is.
        build: the model in eval mode, its positional and its keyword arguments.
        kind: "transformer", "cnn", "recurrent", "graph" or "other".
    """

    name: str
    library: str
    build: Callable[[], Built]
    kind: str = "transformer"


def images(batch: int = 8, size: int = 32) -> Tensor:
    """Random pictures."""
    return torch.randn(batch, 3, size, size)


def tokens(batch: int = 8, length: int = 12, vocabulary: int = 99) -> Tensor:
    """Random token ids, none of them special."""
    return torch.randint(5, vocabulary, (batch, length))


def _hf(name: str, config: str, model: str, inputs: Callable[[], dict[str, Any]], kind: str = "transformer", **settings: Any) -> Entry:  # fmt: skip
    def build() -> Built:
        import transformers

        made = getattr(transformers, model)(getattr(transformers, config)(**settings)).eval()
        return made, (), inputs()

    return Entry(name, "transformers", build, kind)


ENCODER = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
VISION = {**ENCODER, "image_size": 32, "patch_size": 8, "num_labels": 5}
TEXT = {**ENCODER, "vocab_size": 99, "max_position_embeddings": 64, "num_labels": 5}


def pixels() -> dict[str, Any]:
    """One batch of pictures."""
    return {"pixel_values": images()}


def text() -> dict[str, Any]:
    """One batch of texts of different lengths."""
    ids = tokens()
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    mask[2, 9:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def prompt() -> dict[str, Any]:
    """One batch of texts without padding."""
    return {"input_ids": tokens()}


def picture_and_text() -> dict[str, Any]:
    """A picture and a question."""
    return {**text(), "pixel_values": images()}


def two_pictures_and_text() -> dict[str, Any]:
    """A pair of pictures and a sentence."""
    return {**text(), "pixel_values": torch.randn(8, 2, 3, 32, 32)}


TRANSFORMERS = [
    _hf("ViT", "ViTConfig", "ViTForImageClassification", pixels, **VISION),
    _hf("DeiT", "DeiTConfig", "DeiTForImageClassification", pixels, **VISION),
    _hf("Swin", "SwinConfig", "SwinForImageClassification", pixels, image_size=32, patch_size=2, embed_dim=16,
        depths=[2, 2], num_heads=[2, 4], window_size=4, num_labels=5),
    _hf("BEiT", "BeitConfig", "BeitForImageClassification", pixels, **VISION, use_relative_position_bias=True),
    _hf("DINOv2", "Dinov2Config", "Dinov2ForImageClassification", pixels, **{k: v for k, v in VISION.items() if k != "intermediate_size"}),
    _hf("ConvNeXt", "ConvNextConfig", "ConvNextForImageClassification", pixels, "cnn", hidden_sizes=[16, 24, 32, 48],
        depths=[1, 1, 2, 1], num_labels=5),
    _hf("ResNet", "ResNetConfig", "ResNetForImageClassification", pixels, "cnn", embedding_size=16,
        hidden_sizes=[16, 24, 32], depths=[1, 1, 1], layer_type="basic", num_labels=5),
    _hf("MobileNetV2", "MobileNetV2Config", "MobileNetV2ForImageClassification", pixels, "cnn", image_size=32, depth_multiplier=0.35,
        num_labels=5),
    _hf("ViLT (VQA)", "ViltConfig", "ViltForQuestionAnswering", picture_and_text, **{**TEXT, **VISION}),
    _hf("ViLT (NLVR2)", "ViltConfig", "ViltForImagesAndTextClassification", two_pictures_and_text, **{**TEXT, **VISION, "num_labels": 2},
        num_images=2, modality_type_vocab_size=3),
    _hf("BERT", "BertConfig", "BertForSequenceClassification", text, **TEXT),
    _hf("RoBERTa", "RobertaConfig", "RobertaForSequenceClassification", text, **TEXT),
    _hf("DistilBERT", "DistilBertConfig", "DistilBertForSequenceClassification", text, vocab_size=99, dim=32, n_layers=3, n_heads=4,
        hidden_dim=64, max_position_embeddings=64, num_labels=5),
    _hf("ALBERT", "AlbertConfig", "AlbertForSequenceClassification", text, **TEXT, embedding_size=16),
    _hf("GPT-2 (LM)", "GPT2Config", "GPT2LMHeadModel", prompt, vocab_size=99, n_positions=64, n_embd=32, n_layer=3, n_head=4),
    _hf("GPT-2 (classification)", "GPT2Config", "GPT2ForSequenceClassification", prompt, vocab_size=99, n_positions=64, n_embd=32,
        n_layer=3, n_head=4, num_labels=5, pad_token_id=0),
    _hf("LLaMA", "LlamaConfig", "LlamaForCausalLM", prompt, **{k: v for k, v in TEXT.items() if k != "num_labels"}, num_key_value_heads=2),
    _hf("T5 encoder", "T5Config", "T5ForSequenceClassification", lambda: {"input_ids": torch.cat([tokens(), torch.ones(8, 1, dtype=torch.long)], 1)},
        vocab_size=99, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_decoder_layers=1, num_heads=4, num_labels=5,
        feed_forward_proj="gated-gelu", decoder_start_token_id=0),
    _hf("Whisper encoder", "WhisperConfig", "WhisperForAudioClassification", lambda: {"input_features": torch.randn(4, 20, 60)},
        d_model=32, encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=64, decoder_layers=1, decoder_attention_heads=4,
        num_mel_bins=20, max_source_positions=30, vocab_size=99, num_labels=5, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1, suppress_tokens=None, begin_suppress_tokens=None),
    _hf("Wav2Vec2", "Wav2Vec2Config", "Wav2Vec2ForSequenceClassification", lambda: {"input_values": torch.randn(4, 800)}, **ENCODER,
        conv_dim=[16, 16, 16], conv_kernel=[10, 3, 3], conv_stride=[5, 2, 2], num_feat_extract_layers=3,
        num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4, num_labels=5, vocab_size=32, classifier_proj_size=16),
    _hf("PatchTST", "PatchTSTConfig", "PatchTSTForPrediction", lambda: {"past_values": torch.randn(8, 64, 3)},
        num_input_channels=3, context_length=64, prediction_length=8, patch_length=8, patch_stride=8,
        d_model=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=64, loss="mse"),
]  # fmt: skip


class LSTMForecaster(nn.Module):
    """A plain LSTM that predicts the next eight steps."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 24, num_layers=2, batch_first=True)
        self.head = nn.Linear(24, 8)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, 3) -> (B, 8)."""
        return self.head(self.lstm(x)[0][:, -1])


class GRUForecaster(nn.Module):
    """A bidirectional GRU that predicts the next eight steps."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(3, 16, batch_first=True, bidirectional=True)
        self.head = nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, 3) -> (B, 8)."""
        return self.head(self.gru(x)[0].mean(1))


class UNet(nn.Module):
    """Two scales, skip connections, group norm, a transposed convolution and a resize."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = self._block(3, 16), self._block(16, 32)
        self.middle = self._block(32, 32)
        self.up2, self.merge2 = nn.ConvTranspose2d(32, 16, 2, stride=2), self._block(48, 16)
        self.merge1, self.out = self._block(32, 16), nn.Conv2d(16, 4, 1)

    @staticmethod
    def _block(inside: int, outside: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(inside, outside, 3, padding=1), nn.GroupNorm(4, outside), nn.SiLU())

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 4, H, W) logits per pixel."""
        fine = self.down1(x)
        coarse = self.down2(F.max_pool2d(fine, 2))
        bottom = self.middle(F.avg_pool2d(coarse, 2))
        half = self.merge2(torch.cat([self.up2(bottom), coarse], 1))
        whole = F.interpolate(half, scale_factor=2, mode="bilinear", align_corners=False)
        return self.out(self.merge1(torch.cat([whole, fine], 1)))


class VariationalAutoencoder(nn.Module):
    """Encoder, reparametrised code at its mean in eval mode, decoder with transposed convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, 8, 4, 2, 1), nn.ELU(), nn.Conv2d(8, 16, 4, 2, 1), nn.ELU(), nn.Flatten()
        )
        self.code = nn.Linear(16 * 64, 2 * 6)
        self.decoder = nn.Sequential(
            nn.Linear(6, 16 * 64), nn.ELU(), nn.Unflatten(1, (16, 8, 8)),
            nn.ConvTranspose2d(16, 8, 4, 2, 1), nn.ELU(), nn.ConvTranspose2d(8, 3, 4, 2, 1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, 32, 32) -> the same, reconstructed."""
        mean, log_variance = self.code(self.encoder(x)).chunk(2, -1)
        noise = torch.randn_like(mean) if self.training else torch.zeros_like(mean)
        return self.decoder(mean + torch.exp(0.5 * log_variance) * noise)


class GraphNetwork(nn.Module):
    """Two rounds of messages along edges, a gate, and an average over nodes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.own = nn.Linear(6, 24), nn.Linear(24, 24), nn.Linear(6, 24)
        self.norm, self.head = nn.LayerNorm(24), nn.Linear(24, 5)

    @staticmethod
    def gather(x: Tensor, edges: Tensor) -> Tensor:
        """Average of each node's neighbours: (B, N, D), (2, E) -> (B, N, D)."""
        source, target = edges
        messages = x.index_select(1, source)
        total = torch.zeros_like(x).index_add(1, target, messages)
        degree = torch.zeros(x.shape[1]).scatter_add(0, target, torch.ones(len(target))).clamp(min=1)
        return total / degree[:, None]

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        """(B, N, 6) nodes and (2, E) edges -> (B, 5)."""
        h = F.leaky_relu(self.gather(self.first(x), edges) + self.own(x))
        h = self.norm(h + F.softplus(self.gather(self.second(h), edges)))
        return self.head(h.mean(1))


class EncoderClassifier(nn.Module):
    """PyTorch's own transformer encoder, whose fast path it takes when nothing is random."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(99, 32, padding_idx=0)
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(32, 5)

    def forward(self, ids: Tensor) -> Tensor:
        """(B, T) -> (B, 5)."""
        padding = ids == 0
        hidden = self.encoder(self.embed(ids), src_key_padding_mask=padding)
        return self.head(hidden.masked_fill(padding[..., None], 0).sum(1) / (~padding).sum(1, keepdim=True))


def _plain(name: str, make: Callable[[], nn.Module], inputs: Callable[[], tuple[Any, ...]], kind: str) -> Entry:
    return Entry(name, "torch", lambda: (make().eval(), inputs(), {}), kind)


def padded() -> tuple[Any, ...]:
    """Token ids with padding."""
    ids = tokens()
    ids[1, 8:] = 0
    return (ids,)


PLAIN = [
    _plain("LSTM forecaster", LSTMForecaster, lambda: (torch.randn(16, 20, 3),), "recurrent"),
    _plain("GRU forecaster", GRUForecaster, lambda: (torch.randn(16, 20, 3),), "recurrent"),
    _plain("U-Net", UNet, lambda: (images(2),), "cnn"),
    _plain("variational autoencoder", VariationalAutoencoder, lambda: (images(4),), "cnn"),
    _plain("graph network", GraphNetwork, lambda: (torch.randn(8, 10, 6), torch.randint(0, 10, (2, 40))), "graph"),
    _plain("nn.TransformerEncoder", EncoderClassifier, padded, "transformer"),
]


def _torchvision(name: str, arguments: dict[str, Any], size: int) -> Entry:
    def build() -> Built:
        import torchvision

        return (
            getattr(torchvision.models, name)(weights=None, num_classes=5, **arguments).eval(),
            (images(2, size),),
            {},
        )

    return Entry(f"torchvision {name}", "torchvision", build, "cnn")


def _timm(name: str, **arguments: Any) -> Entry:
    def build() -> Built:
        import timm

        return timm.create_model(name, num_classes=5, **arguments).eval(), (images(2, 64),), {}

    return Entry(f"timm {name}", "timm", build, "cnn")


OPTIONAL = [
    _torchvision("resnet18", {}, 64), _torchvision("mobilenet_v3_small", {}, 64), _torchvision("efficientnet_b0", {}, 64),
    _timm("resnet10t"), _timm("efficientvit_b0"), _timm("convnext_atto"),
]  # fmt: skip

ZOO: tuple[Entry, ...] = (*TRANSFORMERS, *PLAIN, *OPTIONAL)
