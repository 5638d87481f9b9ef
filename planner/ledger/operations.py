"""The operations that ledger programs are written in: for each, what it makes, what it saves, what it needs meanwhile.

Each method states what torch's own formula for it saves (`tools/autograd/derivatives.yaml`, torch 2.x) and what the
CUDA kernel allocates besides its result. `x.to(...)`, views and in-place forms follow torch's semantics, so a ledger
program reads like the module it describes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from planner.formats import promote
from planner.ledger.profile import Profile, profile_named
from planner.ledger.tape import Dims, Parameter, Storage, Tape, Tensor, trains
from planner.plan import Method

__all__ = ["Operations"]

# Tensors as large as the input that the derivative of an elementwise function makes on its way:
# pow(x, n): n * x ** (n - 1) before it meets the gradient (FunctionsManual.cpp, pow_backward).
# softmax: grad * output (SoftMax.cu, softmax_backward_cuda_out).
_BACKWARD_SCRATCH = {"pow": 2, "softmax": 1}

# What CUDA's autocast runs in fp32 (aten/src/ATen/autocast_mode.h, AT_FORALL_FP32 and AT_FORALL_FP32_SET_OPT_DTYPE).
_AUTOCAST_FP32 = frozenset({"pow", "exp", "log", "rsqrt", "reciprocal", "softplus", "softmax", "log_softmax"})

_POSITIONS_BY_EXAMPLE = frozenset({"opt"})  # positions counted along each example's own mask
_ADDS_BIAS = frozenset({"falcon"})  # linears that add their bias to the product in a step of its own


@dataclass(slots=True)
class Operations(Tape):
    """A tape with torch's operations on it.

    weight_dtype: the format of a weight, by name; trainable: whether it trains; both are the plan's.
    compute: format that autocast casts matrix products to; None outside autocast.
    quantized: whether a linear's weight is stored in 4 bits and unpacked for each product, by module name.
    adapter: wraps the product of a targeted linear (LoRA and its kin); None for linears that are not targeted.
    """

    weight_dtype: Callable[[str], str] = lambda _: "fp32"
    trainable: Callable[[str], bool] = lambda _: True
    compute: str | None = None
    quantized: Callable[[str], bool] = lambda _: False
    adapter: Callable[[Operations, str, Tensor, str, Tensor], Tensor] | None = None
    method: Method = field(default_factory=Method)
    prepare: Callable[[Operations, str, Tensor], tuple[Tensor, Tensor] | None] | None = (
        None  # what scales a linear's input
    )
    virtual: Callable[[Operations, Tensor], Tensor] | None = None  # puts virtual tokens before the embedded text
    past: tuple[Tensor, Tensor] | None = None  # keys and values that the running block finds in the cache
    cache: list[Storage] = field(default_factory=list)  # keys and values that a cache keeps until the loss is there
    targeted: Callable[[str], bool] = lambda _: False  # whether a linear carries an adapter
    prefix: str = ""
    unpacked: str = "bf16"  # what 4-bit weights are multiplied in outside autocast
    packed_from: str = "bf16"  # the format that 4-bit weights were packed from, and are unpacked to first
    double_quantization: bool = False
    follows_equal: bool = True  # the micro-batch before was as large, and what is left of it counts
    kept_inputs: set[int] = field(default_factory=set)  # rows that 4-bit products keep as attributes of their nodes
    inputs_require_grad: bool = False  # peft's enable_input_require_grads: the embedding's output is made to need one
    held: list[Storage] = field(default_factory=list)
    model_locals: list[Storage] = field(
        default_factory=list
    )  # local variables of the model's forward, around the blocks
    profile: Profile = field(default_factory=lambda: profile_named("transformers"))
    attention: str = "sdpa"
    tensor: int = 1  # ranks of the tensor-parallel group; sizes are one rank's already
    sequence_parallel: bool = False
    selective: bool = False  # the attention core alone runs again in backward
    compiled: bool = False  # torch.compile on the loss
    selected: bool = False  # whether a program has run a core that way
    returned: list[Tensor] = field(default_factory=list)  # attention weights that the last block handed to the model
    call_locals: list[Tensor] = field(default_factory=list)  # further local variables of the running attention module
    recomputes: bool = False  # blocks are recomputed, with the tables and masks that they were called with
    positions: int = 0  # the longest sequence that the model is made for
    family: str = ""  # the model_type, for what its reference modules do their own way
    embedding_name: str = "model.embed_tokens.weight"  # the table that a tied head shares
    rotary: tuple[Tensor, ...] = ()
    masks: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    _known: dict[str, Parameter] = field(default_factory=dict)

    # ---- weights ----------------------------------------------------------------------------------------------

    def weight(self, name: str, dims: Dims, *, dtype: str | None = None, trainable: bool | None = None) -> Parameter:
        """The parameter `name` of the running block, declared on first use."""
        path = self.prefix + name
        known = self._known.get(path)
        if known is None:
            known = self._known[path] = Parameter(
                path,
                dims,
                self.weight_dtype(name) if dtype is None else dtype,
                self.trainable(name) if trainable is None else trainable,
            )
            self.parameters.append(known)
        return known

    def known_weight(self, name: str) -> Parameter | None:
        """The parameter `name` of the running block, if it has been declared."""
        return self._known.get(self.prefix + name)

    def cast(self, weight: Parameter) -> Tensor:
        """autocast's copy of a weight in the compute format, kept in its cache until the forward pass ends.

        torch/csrc/autograd autocast_mode.cpp, cached_cast: only fp32 leaves that require a gradient are cached.
        """
        assert self.compute is not None
        known = self.casts.get(weight.name)
        if known is None:
            (known,) = self.apply("autocast weight", [weight], [(weight.dims, self.compute)])
            if weight.trainable:
                self.casts[weight.name] = known
        return known

    # ---- matrix products --------------------------------------------------------------------------------------

    def base_linear(self, name: str, x: Tensor, out: str, *, bias: bool = False) -> Tensor:
        """A linear without what an adapter adds to it."""
        adapter, self.adapter = self.adapter, None
        result = self.linear(name, x, out, bias=bias)
        self.adapter = adapter
        return result

    def linear(self, name: str, x: Tensor, out: str, *, bias: bool = False) -> Tensor:
        """x @ W.T + b. Saves x if W trains; saves W (no memory unless it is a copy) if x needs a gradient."""
        self.module = name
        weight = self.weight(name + ".weight", (out, x.dims[-1]))
        offset = self.weight(name + ".bias", (out,)) if bias else None
        scaled = None if self.prepare is None else self.prepare(self, name, x)
        if scaled is not None:
            x = scaled[0]
        if self.quantized(name):
            result = self._linear_4bit(weight, offset, x, out)
        else:
            dims = (*x.dims[:-1], out)
            separate = self.family in _ADDS_BIAS
            result = self.product(x, weight, dims, None if separate else offset)
            if offset is not None and separate:
                whole = (dims, result.dtype)
                result = self.apply("add", [result, offset], [whole], alias=True, raw_gradients=[None, whole])[0]
        return result if self.adapter is None else self.adapter(self, name, x, out, result)

    def product(self, x: Tensor, weight: Parameter, dims: Dims, bias: Parameter | None = None) -> Tensor:
        """A matrix product with a weight, under autocast or not."""
        if self.compute is None:
            inputs: list[Tensor | Parameter] = [x, weight]
            saves = [x if weight.trainable else None]
            return self._apply_product(inputs, bias, (dims, x.dtype), saves)
        x = self.to(x, self.compute)
        copy = self.cast(weight) if weight.dtype != self.compute else weight
        row = self.cast(bias) if bias is not None and bias.dtype != self.compute else bias
        saves = [x if weight.trainable else None, copy if x.requires_grad and isinstance(copy, Tensor) else None]
        return self._apply_product([x, copy], row, (dims, self.compute), saves)

    def _apply_product(
        self,
        inputs: list[Tensor | Parameter],
        bias: Tensor | Parameter | None,
        result: tuple[Dims, str],
        saves: Sequence[Tensor | None],
    ) -> Tensor:
        """x's gradient is a view of a product of two dims; a bias's is the incoming one, summed over all rows."""
        viewed = [True, True, False]  # dx is reshaped, dW transposed
        if bias is None:
            return self.apply("linear", inputs, [result], saves=saves, viewed=viewed)[0]
        alias, raw = [False, False, True], [None, None, result]
        return self.apply(
            "linear", [*inputs, bias], [result], saves=saves, alias=alias, raw_gradients=raw, viewed=viewed
        )[0]

    def _linear_4bit(self, weight: Parameter, bias: Parameter | None, x: Tensor, out: str) -> Tensor:
        """bitsandbytes autograd/_functions.py MatMul4Bit: unpacks the weight for the product and again for its
        gradient; saves nothing (up to 0.42, its input). Unpacking takes the block scales in fp32, where they are quantised themselves, and
        makes the format that the weight was packed from, which is then cast."""
        compute = self.compute or self.unpacked
        inner = self.to(x, compute)
        copy = ((out, x.dims[-1]), compute)
        made = ((out, x.dims[-1]), self.packed_from)
        scales = self.dim("blocks", -(-self.sizes[out] * self.sizes[x.dims[-1]] // 64))
        first: list[tuple[Dims, str]] = [made] if made == copy else [made, copy]
        if self.double_quantization and made == copy:
            first.append(((scales,), "fp32"))
        self.module = weight.name.rpartition(":")[2].rpartition(".")[0]
        if self.profile.packed_saves_input:
            self.kept_inputs.add(inner.storage.index)
        unpacking = [self.allocate("unpack", dims, dtype) for dims, dtype in first]
        unpacking.clear()
        inputs: list[Tensor | Parameter] = [inner] if bias is None else [inner, bias]
        (result,) = self.apply(
            "linear 4-bit",
            inputs,
            [((*x.dims[:-1], out), compute)],
            saves=[inner if self.profile.packed_saves_input else None],
            scratch=[copy],
            backward_first=first,
            backward_scratch=[copy],
        )
        return self.to(result, x.dtype)

    def convolution(self, name: str, x: Tensor, dims: Dims, kernel: Dims, *, bias: bool = True) -> Tensor:
        """A convolution, with a bias. One formula gives all its gradients, so it saves x and the kernel whichever of
        them trains (derivatives.yaml, convolution_backward). cuDNN's workspace is not in it.
        """
        self.module = name
        weight = self.weight(f"{name}.weight", kernel)
        inputs: list[Tensor | Parameter] = [x, weight]
        if bias:
            inputs.append(self.weight(f"{name}.bias", kernel[:1]))
        if self.compute is not None:
            x = self.to(x, self.compute)
            inputs = [x, *(self.cast(part) for part in inputs[1:] if isinstance(part, Parameter))]
        saves = [value for value in inputs[:2] if isinstance(value, Tensor)]
        return self.apply("convolution", inputs, [(dims, x.dtype)], saves=saves)[0]

    def matmul(self, first: Tensor, second: Tensor, dims: Dims) -> Tensor:
        """Batched product of two activations; each is saved if the other needs a gradient."""
        if self.compute is not None:
            first, second = self.to(first, self.compute), self.to(second, self.compute)
        saves = [first if second.requires_grad else None, second if first.requires_grad else None]
        return self.apply("matmul", [first, second], [(dims, first.dtype)], saves=saves, viewed=True)[0]

    # ---- elementwise ------------------------------------------------------------------------------------------

    def to(self, x: Tensor, dtype: str) -> Tensor:
        """A copy in another format, or x itself."""
        return x if x.dtype == dtype else self.apply("to", [x], [(x.dims, dtype)])[0]

    def add(self, first: Tensor, second: Tensor) -> Tensor:
        """Sum of two tensors; the gradient passes through unchanged, so it needs no memory of its own."""
        dims = first.dims if len(first.dims) >= len(second.dims) else second.dims
        dtype = promote(first.dtype, second.dtype)
        same = [value.dims == dims and value.dtype == dtype for value in (first, second)]
        return self.apply("add", [first, second], [(dims, dtype)], alias=same)[0]

    def subtract(self, x: Tensor, row: Tensor) -> Tensor:
        """x minus one value a row; that value's gradient is negated at full size before it is summed."""
        whole = (x.dims, x.dtype)
        return self.apply("sub", [x, row], [whole], alias=[True, False], raw_gradients=[None, whole])[0]

    def add_(self, x: Tensor, other: Tensor) -> Tensor:
        """In-place sum: the result has x's storage."""
        return self.apply("add_", [x, other], [(x.dims, x.dtype)], alias=True, in_place=True)[0]

    def mul(self, first: Tensor | Parameter, second: Tensor | Parameter, dims: Dims | None = None) -> Tensor:
        """Product of two tensors or of a weight and a tensor; each is saved if the other needs a gradient."""
        if dims is None:
            dims = first.dims if self._wider(first, second) else second.dims
        dtype = promote(first.dtype, second.dtype)
        inputs = [first, second]
        saves = [
            first if isinstance(first, Tensor) and trains(second) else None,
            second if isinstance(second, Tensor) and trains(first) else None,
        ]
        raw = [None if value.dims == dims and value.dtype == dtype else (dims, dtype) for value in inputs]
        return self.apply("mul", inputs, [(dims, dtype)], saves=saves, raw_gradients=raw)[0]

    @staticmethod
    def _wider(first: Tensor | Parameter, second: Tensor | Parameter) -> bool:
        if len(first.dims) != len(second.dims):
            return len(first.dims) > len(second.dims)
        return sum(dim == "1" for dim in first.dims) <= sum(dim == "1" for dim in second.dims)

    def scale(self, x: Tensor, operator: str = "scale") -> Tensor:
        """x times a Python number: nothing is saved."""
        return self.apply(operator, [x], [(x.dims, x.dtype)])[0]

    def map(self, operator: str, x: Tensor, *, saves: str = "input", dtype: str | None = None) -> Tensor:
        """An elementwise function that saves its `input`, its `output`, or `nothing`.

        input: silu, gelu, pow, abs, softplus, log_sigmoid. output: tanh, sigmoid, exp, relu, sqrt, rsqrt, softmax.
        """
        if self.compute is not None and operator in _AUTOCAST_FP32:
            x = self.to(x, "fp32")
        size = (x.dims, dtype or x.dtype)
        return self.apply(
            operator,
            [x],
            [size],
            saves=[x] if saves == "input" else (),
            saves_outputs=(0,) if saves == "output" else (),
            backward_scratch=[size] * _BACKWARD_SCRATCH.get(operator, 0),
        )[0]

    def dropout(self, x: Tensor, probability: float) -> Tensor:
        """Dropout: CUDA's fused kernel keeps one byte an element; nothing happens at probability 0."""
        if not probability:
            return x
        mask = [(x.dims, "bool")]
        return self.apply("dropout", [x], [(x.dims, x.dtype)], extra_saved=mask)[0]

    # ---- shapes -----------------------------------------------------------------------------------------------

    def view(self, x: Tensor, dims: Dims) -> Tensor:
        """Another shape of the same memory."""
        return self.apply("view", [x], [(dims, x.dtype)], view=True)[0]

    def copy(self, x: Tensor, dims: Dims | None = None, operator: str = "copy") -> Tensor:
        """The same elements in memory of their own: contiguous(), clone(), expand().reshape()."""
        return self.apply(operator, [x], [(dims or x.dims, x.dtype)], alias=dims is None)[0]

    def slices(self, x: Tensor, parts: Sequence[Dims]) -> list[Tensor]:
        """x[..., a:b] for each part, as views; each gradient is first written into zeros of x's full size."""
        return [self.apply("slice", [x], [(part, x.dtype)], view=True, copies=True)[0] for part in parts]

    def split(self, x: Tensor, parts: Sequence[Dims]) -> list[Tensor]:
        """x.split or chunk: views of x; their gradients are put together into one tensor."""
        return self.apply("split", [x], [(part, x.dtype) for part in parts], view=True, copies=True)

    def cat(self, parts: Sequence[Tensor], dims: Dims, operator: str = "cat") -> Tensor:
        """Concatenation; the parts' gradients are views of the result's."""
        dtype = parts[0].dtype
        for part in parts[1:]:
            dtype = promote(dtype, part.dtype)
        return self.apply(operator, list(parts), [(dims, dtype)], alias=True, viewed=True)[0]

    def hold(self, *tensors: Tensor) -> None:
        """Keep tensors that every block uses (rotary tables, masks) until the step ends."""
        self.held.extend(tensor.storage for tensor in tensors)

    def shared(self, name: str, dims: Dims, dtype: str) -> Tensor:
        """A tensor that the model makes once and hands to every block, made on first use."""
        known = self.masks.get((name, ""))
        if known is None:
            known = self.masks[name, ""] = self.constant(name, dims, dtype)
        return known

    def mask(self, queries: str, keys: str, dtype: str) -> Tensor:
        """The additive attention mask, one row of (S, S) for each example, made once and shared."""
        known = self.masks.get((queries, keys))
        if known is None:
            known = self.masks[(queries, keys)] = self.constant("mask", ("B", "1", queries, keys), dtype)
        return known

    def softmax_fp32(self, scores: Tensor) -> Tensor:
        """softmax(scores, dtype=float32).to(scores.dtype): keeps the fp32 result."""
        return self.to(self.map("softmax", self.to(scores, "fp32"), saves="output"), scores.dtype)

    def position_batch(self, batch: str) -> str:
        """The batch dim of position embeddings: one row of positions serves the whole batch."""
        return batch if self.family in _POSITIONS_BY_EXAMPLE else "1"
