"""What random weights add to the covariance of a linear layer's outputs, whatever their structure.

For inputs with second moment S = E[a a^T], independent of the weights, it is sum_kl Cov[W_ck, W_dl] S_kl, with the
bias as the weight of a constant input.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bayespass.curvature.forms import Basis, Form, Root, sum_of


class LayerNoise(nn.Module):
    """sum_kl Cov[W_ck, W_dl] S_kl of one linear layer, bias included as the weight of a constant input.

    Args:
        layer: the layer.
        names: of its "weight" and "bias" in the posterior, "" where there is none.
        forms: the posterior's covariance as a sum of forms.
    """

    def __init__(self, layer: nn.Linear, names: Mapping[str, str], forms: list[Form]) -> None:
        super().__init__()
        self.shape = (layer.out_features, layer.in_features)
        self.size = 0
        self.roots: list[int] = []
        for form in forms:
            known = form.variance if isinstance(form, Basis) else form.columns
            if not set(names.values()) & set(known):
                continue
            (self._add_basis if isinstance(form, Basis) else self._add_root)(form, names, layer.weight)
            self.size += 1

    def _add_basis(self, form: Form, names: Mapping[str, str], like: Tensor) -> None:
        assert isinstance(form, Basis)
        for key, name in names.items():
            if name in form.variance:
                self._keep(f"{key}_variance", form.variance[name][0], like)
                self._keep(f"{key}_left", form.left.get(name), like)
                self._keep(f"{key}_right", form.right.get(name), like)

    def _add_root(self, form: Form, names: Mapping[str, str], like: Tensor) -> None:
        """R as (K, out, in + 1), or R R^T as (out, out, (in + 1)^2) where that is less work."""
        assert isinstance(form, Root)
        rows, columns = self.shape
        rank = next(iter(form.columns.values())).shape[-1]
        weight = form.columns.get(names["weight"], like.new_zeros(rows, columns, rank))
        bias = form.columns.get(names["bias"], like.new_zeros(rows, rank))
        root = torch.cat([weight, bias[:, None]], 1)  # (out, in + 1, K)
        self._keep("root", root.movedim(-1, 0), like)
        if rank > rows:
            flat = root.reshape(-1, rank)
            whole = (flat @ flat.mT).view(rows, columns + 1, rows, columns + 1)
            self._keep("whole", whole.permute(0, 2, 1, 3).reshape(rows * rows, -1), like)

    def _keep(self, name: str, value: Tensor | None, like: Tensor) -> None:
        if value is not None:
            self.register_buffer(name, value.to(like.device, like.dtype), persistent=False)

    def _get(self, name: str) -> Tensor | None:
        return self._buffers.get(name)

    def joint(self, mean: Tensor, covariance: Tensor | None) -> Tensor:
        """(n, out, out) from m (n, in) and C (n, in, in), None for a known input."""
        found: list[Tensor] = []
        if (variance := self._get("weight_variance")) is not None:
            right, left = self._get("weight_right"), self._get("weight_left")
            turned = mean if right is None else mean @ right
            second = turned.square()
            if covariance is not None and right is None:
                second = second + covariance.diagonal(dim1=1, dim2=2)
            elif covariance is not None and right is not None:
                second = second + ((covariance @ right) * right).sum(1)
            found.append(_in_basis(second @ variance.mT, left))
        if (variance := self._get("bias_variance")) is not None:
            found.append(_in_basis(variance[None], self._get("bias_left")).expand(len(mean), -1, -1))
        root, whole = self._get("root"), self._get("whole")
        if root is not None:
            second = F.pad(mean, (0, 1), value=1.0)
            second = second[:, :, None] * second[:, None]
            if covariance is not None:
                second = second + F.pad(covariance, (0, 1, 0, 1))
            if whole is None:
                found.append(sum_of(each @ second @ each.mT for each in root))
            else:
                found.append((second.flatten(1) @ whole.mT).view(-1, self.shape[0], self.shape[0]))
        return sum_of(found)

    def marginal(self, mean: Tensor, variance: Tensor | None) -> Tensor:
        """(n, out) variances from m (n, in) and variances (n, in) of independent inputs."""
        found: list[Tensor] = []
        if (spread := self._get("weight_variance")) is not None:
            right, left = self._get("weight_right"), self._get("weight_left")
            second = (mean if right is None else mean @ right).square()
            if variance is not None:
                second = second + (variance if right is None else variance @ right.square())
            value = second @ spread.mT
            found.append(value if left is None else value @ left.square().mT)
        if (spread := self._get("bias_variance")) is not None:
            left = self._get("bias_left")
            found.append((spread if left is None else left.square() @ spread).expand(len(mean), -1))
        if (root := self._get("root")) is not None:
            along = torch.einsum("nk,zck->ncz", F.pad(mean, (0, 1), value=1.0), root)
            found.append(along.square().sum(-1))
            if variance is not None:
                found.append(variance @ root[..., :-1].square().sum(0).mT)
        return sum_of(found)


def _in_basis(variance: Tensor, basis: Tensor | None) -> Tensor:
    """Q diag(v) Q^T for every row of v (n, c)."""
    return torch.diag_embed(variance) if basis is None else (basis * variance[:, None]) @ basis.mT
