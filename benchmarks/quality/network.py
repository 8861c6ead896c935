"""Networks that are compared: the frozen base with LoRA, with a memory (ours), or with Memorizing Transformers' one.

The forward pass is written for training on one device without a host in its way: a step is static in shape, so that a
CUDA graph holds all of it. What is trained is what `integration.attach` reads: MemoryWeights and LoRA by peft.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.quality.attending import Read, attend
from benchmarks.quality.memorizing import MemorizingWeights
from benchmarks.quality.ring import Ring, exact_top, nearness
from integration.adapter import add_lora
from integration.families import find_decoder
from integration.weights import MemoryWeights
from model_client.cache_attention import RetrievedRows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from transformers import LlamaForCausalLM

    from integration.config import MemoryConfig
    from model_client.cache_attention import StateProjection


def decoder_of(model: Any) -> Any:
    """The list of layers with its embedding and norm, whatever wraps it."""
    return find_decoder(model).module


def fuse_norms(model: nn.Module) -> None:
    """One kernel for each norm instead of five; the same numbers up to rounding."""
    for module in model.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            module.forward = _fused(module)  # type: ignore[method-assign]


def _fused(norm: Any) -> Callable[[Tensor], Tensor]:
    def forward(states: Tensor) -> Tensor:
        with torch.autocast(states.device.type, enabled=False):
            return functional.rms_norm(states, norm.weight.shape, norm.weight.to(states.dtype), norm.variance_epsilon)

    return forward


def merge_forward(model: nn.Module) -> None:
    """One product a LoRA layer: W + BA first, which is small, instead of casts and sums of the states."""
    for module in model.modules():
        if hasattr(module, "lora_A") and hasattr(module, "base_layer"):
            module.forward = _merged(module)  # type: ignore[method-assign]


def _merged(layer: Any) -> Callable[[Tensor], Tensor]:
    down, up, scale = layer.lora_A["default"], layer.lora_B["default"], layer.scaling["default"]

    def forward(states: Tensor) -> Tensor:
        with torch.autocast(states.device.type, enabled=False):
            weight = layer.base_layer.weight + scale * (up.weight @ down.weight)
        return functional.linear(states, weight, layer.base_layer.bias)

    return forward


def run_layers(decoder: Any, ids: Tensor, before: Callable[[int, Tensor], None] | None = None) -> Tensor:
    """(batch, length) ids -> (batch, length, hidden_size) of the last layer. before: told what enters each layer."""
    hidden = decoder.embed_tokens(ids)
    rotary = decoder.rotary_emb(hidden, position_ids=torch.arange(ids.shape[1], device=ids.device)[None])
    for number, layer in enumerate(decoder.layers):
        if before is not None:
            before(number, hidden)
        hidden = layer(hidden, attention_mask=None, position_embeddings=rotary)
    normed: Tensor = decoder.norm(hidden)
    return normed


class Gathered(RetrievedRows):
    """Rows that lie in the order of their entries already: rows (N, E, d)."""

    def chunks(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """All in one."""
        yield slice(0, len(self.rows)), self.rows.to(dtype)


def project(projection: StateProjection, states: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The projection's keys, on a GPU in 16 bits from end to end; sums within are float32 there too."""
    if not states.is_cuda:
        return projection(states)
    projected = projection.linear(states).to(dtype)
    with torch.autocast("cuda", enabled=False):
        return functional.layer_norm(projected, projected.shape[-1:])


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkSpec:
    """What is trained. kind: "lora", "memory", "heads" (each head with a projection and hits of its own) or "mt".

    lora_rank: 0 for none. fixed_projection: train all but W_p. init: of the cache attention, "plain" (keys and values
    at random), "model" (the layer's own, carried through the projection) or "similar" (plain, and each head begins by
    weighing how near a row is); of "mt", "unit" or "open", see MemorizingWeights.
    """

    kind: str
    config: MemoryConfig
    lora_rank: int = 16
    init: str = "plain"
    projection: str = "pca"
    fixed_projection: bool = False


class Network(nn.Module):
    """A frozen model and what is trained beside it."""

    def __init__(self, model: LlamaForCausalLM, spec: NetworkSpec) -> None:
        super().__init__()
        model.requires_grad_(False).eval()
        fuse_norms(model)
        self.spec, self.config = spec, spec.config
        self.weights: Any = None
        if self.has_memory:
            self.weights = MemoryWeights.for_model(model, spec.config, dtype=torch.float32).train()
        self.model: Any = add_lora(model, spec.lora_rank) if spec.lora_rank else model
        merge_forward(self.model)
        self.decoder = decoder_of(self.model)
        if spec.kind == "mt":
            attention = self.decoder.layers[spec.config.retrieval_layer].self_attn
            self.weights = MemorizingWeights(attention, spec.init)
        self.head = self.decoder_head()
        self.ring: Any = None
        self._retrieved: Any = None
        self._local: tuple[Tensor, Tensor] | None = None
        if spec.kind != "heads":
            self._hook()

    @property
    def has_memory(self) -> bool:
        """Whether states are kept and read by cache attention."""
        return self.spec.kind in ("memory", "heads")

    @property
    def parts(self) -> list[MemoryWeights]:
        """What looks up for itself: the memory's weights, or those of each head."""
        return list(self.weights) if self.spec.kind == "heads" else [self.weights]

    def part_heads(self) -> None:
        """Gives each head its own copy of the projection, and with it a retrieval of its own, from what is there."""
        if self.spec.kind == "heads":
            self.weights = nn.ModuleList(
                one_head(self.weights, self.config, head) for head in range(self.config.num_heads)
            )
            self._hook()

    def decoder_head(self) -> Any:
        """The output embedding."""
        return self.model.get_output_embeddings()

    def trained(self) -> list[tuple[str, nn.Parameter]]:
        """Names and parameters that are trained, memory weights first."""
        own = [] if self.weights is None else list(self.weights.named_parameters())
        if self.spec.fixed_projection:
            own = [(name, each) for name, each in own if not name.startswith("projection")]
        lora = [(name, each) for name, each in self.model.named_parameters() if each.requires_grad]
        return [(f"memory.{name}", each) for name, each in own] + [(f"lora.{name}", each) for name, each in lora]

    def make_ring(self, batch: int, segment: int, dtype: torch.dtype = torch.bfloat16) -> None:
        """An empty memory for a batch of documents. dtype: of what is kept."""
        if self.spec.kind == "lora":
            return
        config, device = self.config, self.head.weight.device
        heads = (config.num_heads, config.head_dim)
        widths = {"hidden": (config.hidden_size,)} if self.has_memory else {"key": heads, "value": heads}
        self.ring = Ring(batch, config.capacity, segment, widths, device=device, dtype=dtype)

    def loss(self, windows: Tensor, begun: Tensor | None = None) -> Tensor:
        """Mean nats of windows (batch, segment + 1); retrieves before it appends. begun: rows with a new document."""
        return self.losses(windows, begun).mean()

    def losses(self, windows: Tensor, begun: Tensor | None = None) -> Tensor:
        """Nats of each token, (batch, segment) float32."""
        if self.ring is not None and begun is not None:
            self.ring.begin(begun)
        self._retrieved = self._local = None
        hidden = run_layers(self.decoder, windows[:, :-1], self._enter)
        logits = self.head(hidden)
        nats = functional.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten(), reduction="none")
        return nats.view(windows.shape[0], -1)

    def _enter(self, number: int, hidden: Tensor) -> None:
        if self.has_memory and self.ring is not None and number == self.config.retrieval_layer:
            self._retrieved = [self.look_up(hidden.detach(), each) for each in self.parts]
            self.ring.append(hidden=hidden.detach())

    @torch.no_grad()
    def search(self, keys: Tensor, projection: StateProjection) -> Tensor:
        """Slots (batch, T, k) nearest to keys (batch, T, d) among the kept states, projected as they are now."""
        # Half precision on a GPU: bf16 would tie what differs by less than a hundredth.
        kept = project(projection, self.ring.hidden, torch.float16)
        return exact_top(nearness(keys.to(kept.dtype), kept, self.ring.is_empty()), self.config.top_k)

    def look_up(self, hidden: Tensor, weights: MemoryWeights) -> Read:
        """What the tokens of a segment may attend to; gradients reach the projection."""
        config, batch = self.config, hidden.shape[0]
        keys = weights.projection(hidden)
        slots, is_live = self.ring.neighbours(
            self.search(keys.detach(), weights.projection), config.before, config.after
        )
        slots, is_live = slots.flatten(2), is_live.flatten(2)
        rows = torch.arange(batch, device=hidden.device)[:, None, None]
        found = project(weights.projection, self.ring.hidden[rows, slots])
        return Read(found, is_live, keys, config.context)

    def _hook(self) -> None:
        layers = self.decoder.layers
        if self.has_memory:
            for number in self.config.attention_layers:
                layers[number].self_attn.register_forward_hook(self._reader(number), with_kwargs=True)
        if self.spec.kind == "mt":
            attention = layers[self.config.retrieval_layer].self_attn
            attention.register_forward_pre_hook(self._remember, with_kwargs=True)
            attention.o_proj.register_forward_pre_hook(self._mix)

    def _reader(self, number: int) -> Any:
        attentions = [each.cache_attention(number) for each in self.parts]

        def read(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            if self._retrieved is None:
                return None
            states = args[0] if args else kwargs["hidden_states"]
            added = [attend(one, states, rows) for one, rows in zip(attentions, self._retrieved, strict=True)]
            return (output[0] + torch.stack(added).sum(dim=0) if len(added) > 1 else output[0] + added[0], *output[1:])

        return read

    def _remember(self, attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.ring is None:
            return
        states = args[0] if args else kwargs["hidden_states"]
        self._local = self.weights.read_ring(states, attention, self.ring, self.config.top_k)

    def _mix(self, _: nn.Module, args: tuple[Any, ...]) -> Any:
        if self._local is None:
            return None
        return (self.weights.mix(args[0], *self._local),)


@torch.no_grad()
def initialise(network: Network, states: Tensor) -> None:
    """Begins with the projection and the cache attention that the spec names; states: (n, hidden_size) of the layer."""
    spec, weights = network.spec, network.weights
    if not network.has_memory:
        return
    if spec.projection == "pca":
        weights.projection.fit(states)
    if spec.init == "model":
        weights.read_as_layers(network.model, states)
    if spec.init == "similar":
        for number in spec.config.attention_layers:
            weights.cache_attention(number).similarity.fill_(1.0)
    network.part_heads()


@torch.no_grad()
def one_head(weights: MemoryWeights, config: MemoryConfig, head: int) -> MemoryWeights:
    """What one head of each cache attention does, as a memory of its own; the sum of all heads is what all do."""
    shared = config.num_heads // config.num_kv_heads
    own = MemoryWeights(config.with_changes(num_heads=1, num_kv_heads=1), dtype=torch.float32)
    own.projection.load_state_dict(weights.projection.state_dict())
    for number, target in own.layers.items():
        source, width = weights.cache_attention(int(number)), config.head_dim
        rows, shared_rows = slice(head * width, (head + 1) * width), head // shared * width
        target.q_proj.weight.copy_(source.q_proj.weight[rows])
        target.q_proj.bias.copy_(source.q_proj.bias[rows])
        target.k_proj.weight.copy_(source.k_proj.weight[shared_rows : shared_rows + width])
        target.v_proj.weight.copy_(source.v_proj.weight[shared_rows : shared_rows + width])
        target.o_proj.weight.copy_(source.o_proj.weight[:, rows])
        for name in ("similarity", "slot_bias", "null_logit"):
            getattr(target, name).copy_(getattr(source, name)[head : head + 1])
    return own.to(weights.projection.linear.weight.device)
