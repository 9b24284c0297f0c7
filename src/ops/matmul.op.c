/* Matrix products: linear, matmul, mm, bmm, addmm, baddbmm, mv, dot, outer. Their results are row-major. */
#include "ops/derivatives.h"
#include "ops/iterator.h"

#include <string.h>

/* ---- rules ---- */

/* torch multiplies operands of one dtype on one device; on CUDA only floats, on the CPU everything but booleans. */
static th_status check_pair(const th_call *call, const th__tensor *a, const th__tensor *b) {
    DECLINE_IF(a->dtype != b->dtype || a->device != b->device || a->dtype == TH_BOOL);
    DECLINE_IF(!th__is_float(a->dtype) && !th__is_cpu(call, a));
    return TH_OK;
}

static th_status two_tensors(const th_call *call, uint32_t first, th__tensor *a, th__tensor *b) {
    TRY(th__arg_tensor(call, first, a));
    TRY(th__arg_tensor(call, first + 1, b));
    return check_pair(call, a, b);
}

static th_status linear(th_call *call) {
    th__tensor x, w, bias;
    int64_t shape[TH_MAX_RANK];
    TRY(two_tensors(call, 0, &x, &w));
    DECLINE_IF(x.ndim == 0 || w.ndim != 2 || x.shape[x.ndim - 1] != w.shape[1]);
    if (th__has(call, 2)) {
        TRY(th__arg_tensor(call, 2, &bias));
        TRY(check_pair(call, &x, &bias));
        DECLINE_IF(bias.ndim != 1 || bias.shape[0] != w.shape[0]);
    }
    memcpy(shape, x.shape, x.ndim * sizeof *shape);
    shape[x.ndim - 1] = w.shape[0];
    return th__out_fresh(call, x.dtype, x.device, x.ndim, shape, NULL);
}

static th_status matmul_of(th_call *call, const th__tensor *a, const th__tensor *b) {
    TRY(check_pair(call, a, b));
    DECLINE_IF(a->ndim == 0 || b->ndim == 0);
    uint32_t batch_a = a->ndim > 2 ? a->ndim - 2 : 0, batch_b = b->ndim > 2 ? b->ndim - 2 : 0;
    int64_t inner = b->ndim == 1 ? b->shape[0] : b->shape[b->ndim - 2];
    DECLINE_IF(a->shape[a->ndim - 1] != inner);
    th__dims shape = {0};
    TRY(th__broadcast(&shape, batch_a, a->shape));
    TRY(th__broadcast(&shape, batch_b, b->shape));
    if (a->ndim > 1) shape.at[shape.n++] = a->shape[a->ndim - 2];
    if (b->ndim > 1) shape.at[shape.n++] = b->shape[b->ndim - 1];
    return th__out_fresh(call, a->dtype, a->device, shape.n, shape.at, NULL);
}

static th_status matmul(th_call *call) {
    th__tensor a, b;
    TRY(two_tensors(call, 0, &a, &b));
    return matmul_of(call, &a, &b);
}

static th_status rmatmul(th_call *call) {
    th__tensor a, b;
    TRY(two_tensors(call, 0, &a, &b));
    return matmul_of(call, &b, &a);
}

static th_status ranked(th_call *call, uint32_t rank_a, uint32_t rank_b) {
    th__tensor a, b;
    TRY(two_tensors(call, 0, &a, &b));
    DECLINE_IF(a.ndim != rank_a || b.ndim != rank_b);
    DECLINE_IF(rank_a == 3 && a.shape[0] != b.shape[0]);
    return matmul_of(call, &a, &b);
}

static th_status mm(th_call *call) { return ranked(call, 2, 2); }
static th_status bmm(th_call *call) { return ranked(call, 3, 3); }
static th_status mv(th_call *call) { return ranked(call, 2, 1); }
static th_status dot(th_call *call) { return ranked(call, 1, 1); }

static th_status check_scale(const th_call *call, uint32_t i, th_dtype dtype) {
    const th_node_data *d = th__arg(call, i);
    if (d->kind == TH_N_ABSENT) return TH_OK;
    DECLINE_IF(d->kind != TH_N_INT && !(d->kind == TH_N_FLOAT && th__is_float(dtype)));
    return th__fits(d, dtype) ? TH_OK : TH_DECLINED;
}

/* beta * input + alpha * (a @ b), for matrices or batches of them. */
static th_status add_product(th_call *call, uint32_t rank) {
    th__tensor input, a, b;
    TRY(th__arg_tensor(call, 0, &input));
    TRY(two_tensors(call, 1, &a, &b));
    TRY(check_pair(call, &input, &a));
    TRY(check_scale(call, 3, a.dtype));
    TRY(check_scale(call, 4, a.dtype));
    DECLINE_IF(a.ndim != rank || b.ndim != rank || input.ndim > rank || a.shape[rank - 1] != b.shape[rank - 2]);
    DECLINE_IF(rank == 3 && a.shape[0] != b.shape[0]);
    int64_t shape[3] = {a.shape[0], a.shape[rank - 2], b.shape[rank - 1]};
    shape[rank - 2] = a.shape[rank - 2];
    shape[rank - 1] = b.shape[rank - 1];
    for (uint32_t i = 0; i < input.ndim; i++) {
        DECLINE_IF(input.shape[i] != 1 && input.shape[i] != shape[rank - input.ndim + i]);
    }
    return th__out_fresh(call, a.dtype, a.device, rank, shape, NULL);
}

static th_status addmm(th_call *call) { return add_product(call, 2); }
static th_status baddbmm(th_call *call) { return add_product(call, 3); }

/* Rows or columns of a matrix start at multiples of 16 bytes. */
static bool is_aligned(const th__tensor *x) {
    int64_t unit = 16 / th_dtype_get(x->dtype)->bytes;
    const int64_t *shape = x->shape + x->ndim - 2, *stride = x->stride + x->ndim - 2;
    if (stride[0] == 1 && stride[1] >= (shape[0] > 1 ? shape[0] : 1)) return stride[1] % unit == 0;
    return stride[1] == 1 && stride[0] >= (shape[1] > 1 ? shape[1] : 1) && stride[0] % unit == 0;
}

/* Matrix products of groups of rows (2 dimensions, cut at `offs`) or of batches (3) with one matrix each. Rows of the
 * result are padded to 16 bytes. */
static th_status grouped_mm(th_call *call) {
    th__tensor a, b, offsets;
    int64_t shape[3], stride[3];
    TRY(two_tensors(call, 0, &a, &b));
    DECLINE_IF(!th__is_cpu(call, &a) || !th__is_float(a.dtype) || a.dtype == TH_F64 || th__has(call, 3));
    DECLINE_IF(b.ndim != 3 || (a.ndim != 2 && a.ndim != 3) || a.shape[a.ndim - 1] != b.shape[1]);
    DECLINE_IF(th__numel(a.ndim, a.shape) == 0 || th__numel(b.ndim, b.shape) == 0);
    DECLINE_IF(th__has(call, 4) || th__has(call, 2) != (a.ndim == 2) || !is_aligned(&a) || !is_aligned(&b));
    if (a.ndim == 2) {
        TRY(th__arg_tensor(call, 2, &offsets));
        DECLINE_IF(offsets.ndim != 1 || offsets.dtype != TH_I32 || offsets.shape[0] != b.shape[0]);
        DECLINE_IF(offsets.device != a.device);
    } else {
        DECLINE_IF(a.shape[0] != b.shape[0]);
    }
    int64_t unit = 16 / th_dtype_get(a.dtype)->bytes, columns = b.shape[2];
    uint32_t rows = a.ndim - 2;
    shape[0] = a.shape[0];
    shape[rows] = a.shape[rows];
    shape[rows + 1] = columns;
    stride[rows + 1] = 1;
    stride[rows] = (columns + unit - 1) / unit * unit;
    if (rows) stride[0] = stride[rows] * shape[rows];
    return th__out_fresh(call, a.dtype, a.device, a.ndim, shape, stride);
}

/* A product of a column and a row, as torch computes it. */
static th_status outer(th_call *call) {
    th__tensor a, b;
    th__iter it = {0};
    TRY(th__arg_tensor(call, 0, &a));
    TRY(th__arg_tensor(call, 1, &b));
    DECLINE_IF(a.ndim != 1 || b.ndim != 1);
    th__dims column = {.n = 2, .at = {a.shape[0], 1}};
    int64_t stride[2];
    DECLINE_IF(!th__view_strides(1, a.shape, a.stride, &column, stride));
    a.ndim = 2;
    a.shape = column.at;
    a.stride = stride;
    a.contiguous = false;
    th__iter_tensor(&it, &a);
    th__iter_tensor(&it, &b);
    TRY(th__iter_shape(&it, call));
    TRY(th__iter_promote(&it, call, false));
    return th__iter_out(&it, call, it.common);
}

/* ---- operators ---- */

#define MATMUL(name_, params_, names_, ...) \
    {.name = name_, .params = params_, .names = names_, .fusion = TH_FUSE_MATMUL, .meta = __VA_ARGS__}

const th_opdef th__ops_matmul[] = {
    MATMUL("linear", "input, weight, bias=None", "torch.nn.functional.linear torch._C._nn.linear", linear,
           .grad = th__grad_linear),
    MATMUL("matmul", "input, other", "torch.matmul torch.Tensor.matmul torch.Tensor.__matmul__", matmul,
           .grad = th__grad_matmul),
    MATMUL("rmatmul", "input, other", "torch.Tensor.__rmatmul__", rmatmul),
    MATMUL("mm", "input, mat2", "torch.mm torch.Tensor.mm", mm, .grad = th__grad_mm),
    MATMUL("bmm", "input, mat2", "torch.bmm torch.Tensor.bmm", bmm, .grad = th__grad_bmm),
    MATMUL("mv", "input, vec", "torch.mv torch.Tensor.mv", mv, .grad = th__grad_mv),
    MATMUL("dot", "input, tensor", "torch.dot torch.Tensor.dot", dot, .grad = th__grad_dot),
    MATMUL("addmm", "input, mat1, mat2, *, beta=1, alpha=1", "torch.addmm torch.Tensor.addmm", addmm,
           .grad = th__grad_addmm),
    MATMUL("baddbmm", "input, batch1, batch2, *, beta=1, alpha=1", "torch.baddbmm torch.Tensor.baddbmm", baddbmm,
           .grad = th__grad_baddbmm),
    MATMUL("grouped_mm", "input, mat2, offs=None, bias=None, out_dtype=None",
           "torch._grouped_mm torch.nn.functional.grouped_mm", grouped_mm),
    {.name = "outer",
     .params = "input, vec2",
     .names = "torch.outer torch.Tensor.outer torch.ger torch.Tensor.ger",
     .fusion = TH_FUSE_POINTWISE,
     .meta = outer},
};
const size_t th__ops_matmul_count = sizeof th__ops_matmul / sizeof *th__ops_matmul;
