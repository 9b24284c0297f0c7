/* The input's bytes choose a valid trace of views, writes, draws and effects, and a list of passes. The trace is
 * executed before and after by the machine of machine.h, and must do the same; it must stay well formed and survive its
 * text. */
#include "machine.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

typedef struct maker {
    const uint8_t *at, *end;
    th_ctx *ctx;
    th_trace *t;
    th_val tensors[200];
    uint32_t ntensors;
    th_val numbers[40]; /* int values, each equal to 1 */
    uint32_t nnumbers;
} maker;

static uint32_t choose(maker *k, uint32_t below) { /* 0 when the bytes are used up */
    uint32_t byte = k->at < k->end ? *k->at++ : 0;
    return below ? byte % below : 0;
}

static machine_view view_of(const maker *k, th_val v) {
    machine m = {.t = k->t};
    return machine_type(&m, v);
}

static th_typeref type_of(const maker *k, const machine_view *v) {
    return th_type_tensor(k->ctx, TH_I64, th_device(k->ctx, "cpu", -1), v->ndim, v->shape, v->stride, 0);
}

static th_typeref packed_type(const maker *k, const machine_view *v) {
    return th_type_tensor(k->ctx, TH_I64, th_device(k->ctx, "cpu", -1), v->ndim, v->shape, NULL, 0);
}

static uint32_t group_of(maker *k, th_val v) {
    if (!k->t->values[v].alias) k->t->values[v].alias = th_trace_alias(k->t);
    return k->t->values[v].alias;
}

static th_val keep(maker *k, th_val v) {
    if (k->ntensors < sizeof k->tensors / sizeof *k->tensors) k->tensors[k->ntensors++] = v;
    return v;
}

static th_val pick(maker *k) { /* recent ones more often */
    uint32_t n = k->ntensors, back = choose(k, n < 6 || choose(k, 3) == 0 ? n : 6);
    return k->tensors[n - 1 - back];
}

static void emit(maker *k, const char *callee, uint32_t n, const th_node *args, th_node outs, uint8_t effects,
                 th_val writes) {
    th_trace_op(k->t, &(th_op_args){.kind = TH_OP_CALL,
                                    .callee = th_intern_z(k->ctx, callee),
                                    .args = th_node_seq(k->t, TH_N_TUPLE, n, args),
                                    .outs = outs,
                                    .effects = effects,
                                    .nwrites = writes != 0,
                                    .writes = &writes});
}

static bool broadcasts(const machine_view *from, const machine_view *to) {
    if (from->ndim > to->ndim) return false;
    for (uint32_t i = 0; i < from->ndim; i++) {
        int64_t wanted = to->shape[to->ndim - from->ndim + i];
        if (from->shape[i] != wanted && from->shape[i] != 1) return false;
    }
    return true;
}

/* A tensor that broadcasts to the shape, or an int. */
static th_node operand(maker *k, const machine_view *shape) {
    th_val v = pick(k);
    machine_view view = view_of(k, v);
    bool number = choose(k, 3) == 0 || !broadcasts(&view, shape);
    return number ? th_node_int(k->t, (int64_t)choose(k, 7) - 3) : th_node_value(k->t, v);
}

static void make_pure(maker *k) {
    static const char *const names[] = {"torch.add", "torch.sub", "torch.mul", "torch.neg", "torch.clone"};
    th_val x = pick(k);
    machine_view view = view_of(k, x);
    uint32_t which = choose(k, 5);
    th_node args[2] = {th_node_value(k->t, x), which < 3 ? operand(k, &view) : 0};
    th_val out = keep(k, th_trace_value(k->t, 0, packed_type(k, &view)));
    emit(k, names[which], which < 3 ? 2 : 1, args, th_node_value(k->t, out), 0, 0);
}

static th_node small_int(maker *k, int64_t n) { /* sometimes an int value of the trace in place of a literal 1 */
    if (n == 1 && k->nnumbers && choose(k, 2)) return th_node_value(k->t, k->numbers[choose(k, k->nnumbers)]);
    return th_node_int(k->t, n);
}

static th_node ints(maker *k, uint32_t n, const int64_t *values) {
    th_node kids[MACHINE_DIMS];
    for (uint32_t i = 0; i < n; i++) kids[i] = th_node_int(k->t, values[i]);
    return th_node_seq(k->t, TH_N_TUPLE, n, kids);
}

static th_node random_index(maker *k, const machine_view *v) {
    th_node entries[MACHINE_DIMS];
    uint32_t n = choose(k, v->ndim + 1);
    for (uint32_t i = 0; i < n; i++) {
        int64_t size = v->shape[i];
        if (size > 0 && choose(k, 2)) {
            entries[i] = th_node_int(k->t, (int64_t)choose(k, (uint32_t)(2 * size)) - size);
            continue;
        }
        th_node parts[3] = {th_node_int(k->t, (int64_t)choose(k, 6) - 2), th_node_none(k->t),
                            th_node_int(k->t, 1 + choose(k, 2))};
        if (choose(k, 2)) parts[1] = th_node_int(k->t, (int64_t)choose(k, 6) - 2);
        entries[i] = th_node_seq(k->t, TH_N_SLICE, 3, parts);
    }
    return n == 1 && choose(k, 2) ? entries[0] : th_node_seq(k->t, TH_N_TUPLE, n, entries);
}

static bool random_strided(maker *k, machine_view *v) {
    v->ndim = choose(k, 3);
    v->offset = choose(k, 12);
    for (uint32_t i = 0; i < v->ndim; i++) v->shape[i] = 1 + choose(k, 3), v->stride[i] = choose(k, 5);
    return true;
}

/* The size of a value's storage, as far as the trace tells: the last element of what made it. */
static int64_t storage_size(const maker *k, th_val v) {
    for (th_val w = 1; w < k->t->nvalues; w++) {
        if (w != v && (!k->t->values[v].alias || k->t->values[w].alias != k->t->values[v].alias)) continue;
        machine_view view = view_of(k, w);
        return k->t->values[w].def ? machine_count(&view) : MACHINE_ELEMENTS;
    }
    return 0;
}

static void make_view(maker *k) {
    th_val x = pick(k);
    machine_view v = view_of(k, x);
    machine m = {.t = k->t};
    th_node args[4] = {th_node_value(k->t, x)};
    const char *name;
    uint32_t n = 2, dim = v.ndim ? choose(k, v.ndim) : 0;
    switch (choose(k, 6)) {
    case 0:
        name = "torch.narrow";
        if (!v.ndim || v.shape[dim] < 1) return;
        args[1] = th_node_int(k->t, dim);
        args[2] = th_node_int(k->t, choose(k, (uint32_t)v.shape[dim]));
        int64_t start = k->t->nodes[args[2]].u.i;
        int64_t length = 1 + choose(k, (uint32_t)(v.shape[dim] - start));
        args[3] = small_int(k, length);
        v.offset += start * v.stride[dim];
        v.shape[dim] = length;
        n = 4;
        break;
    case 1:
        name = "torch.transpose";
        if (v.ndim < 2) return;
        args[1] = th_node_int(k->t, 0);
        args[2] = th_node_int(k->t, 1);
        int64_t shape = v.shape[0], stride = v.stride[0];
        v.shape[0] = v.shape[1], v.stride[0] = v.stride[1];
        v.shape[1] = shape, v.stride[1] = stride;
        n = 3;
        break;
    case 2:
        name = "torch.as_strided";
        if (!random_strided(k, &v) || !machine_fits(&v, storage_size(k, x))) return;
        args[1] = ints(k, v.ndim, v.shape);
        args[2] = ints(k, v.ndim, v.stride);
        args[3] = th_node_int(k->t, v.offset);
        n = 4;
        break;
    case 3:
        name = "torch.Tensor.expand";
        if (v.ndim >= 2 || machine_count(&v) > 16) return;
        int64_t wider[MACHINE_DIMS] = {1 + choose(k, 3)};
        for (uint32_t i = 0; i < v.ndim; i++) wider[i + 1] = v.shape[i];
        args[1] = ints(k, v.ndim + 1, wider);
        v = machine_expand(&m, &v, v.ndim + 1, wider);
        break;
    case 4:
        name = "torch.Tensor.contiguous"; /* returns its argument: only of something contiguous */
        if (!th_type_get(k->ctx, k->t->values[x].type)->contiguous) return;
        n = 1;
        break;
    default:
        name = "torch.Tensor.__getitem__";
        args[1] = random_index(k, &v);
        v = machine_index(&m, v, &k->t->nodes[args[1]]);
        if (!machine_fits(&v, storage_size(k, x)) || machine_count(&v) == 0) return;
    }
    th_val out = keep(k, th_trace_value(k->t, 0, type_of(k, &v)));
    k->t->values[out].alias = group_of(k, x);
    k->t->values[out].offset = v.offset;
    emit(k, name, n, args, th_node_value(k->t, out), 0, 0);
}

static void make_unbind(maker *k) {
    th_val x = pick(k), outs[8];
    machine_view v = view_of(k, x);
    if (v.ndim == 0 || v.shape[0] == 0 || v.shape[0] > 8) return;
    uint32_t n = (uint32_t)v.shape[0];
    int64_t step = v.stride[0];
    machine_drop_dim(&v, 0);
    th_node nodes[8], arg = th_node_value(k->t, x);
    for (uint32_t i = 0; i < n; i++, v.offset += step) {
        outs[i] = keep(k, th_trace_value(k->t, 0, type_of(k, &v)));
        k->t->values[outs[i]].alias = group_of(k, x);
        k->t->values[outs[i]].offset = v.offset;
        nodes[i] = th_node_value(k->t, outs[i]);
    }
    emit(k, "torch.unbind", 1, &arg, th_node_seq(k->t, TH_N_TUPLE, n, nodes), 0, 0);
}

/* torch refuses to write to a tensor whose elements meet each other. */
static bool meets_itself(const machine_view *v) {
    bool seen[MACHINE_ELEMENTS] = {false};
    for (int64_t i = 0; i < machine_count(v); i++) {
        int64_t at = machine_at(v, i);
        if (at < 0 || at >= MACHINE_ELEMENTS || seen[at]) return true;
        seen[at] = true;
    }
    return false;
}

static void make_write(maker *k) {
    static const char *const names[] = {"torch.Tensor.add_",  "torch.Tensor.sub_",     "torch.Tensor.mul_",
                                        "torch.Tensor.copy_", "torch.Tensor.fill_",    "torch.Tensor.neg_",
                                        "torch.Tensor.zero_", "torch.Tensor.unknown_", "torch.Tensor.__setitem__"};
    th_val x = pick(k);
    machine m = {.t = k->t};
    machine_view view = view_of(k, x);
    uint32_t which = choose(k, 12), n = 2;
    if (which > 8) which = 8;
    if (which == 7 && choose(k, 4)) which = 0; /* mostly writes that are understood */
    if (meets_itself(&view)) return;
    th_node args[3] = {th_node_value(k->t, x)};
    if (which == 8) {
        args[1] = random_index(k, &view);
        view = machine_index(&m, view, &k->t->nodes[args[1]]);
        args[2] = operand(k, &view);
        if (machine_count(&view) == 0) return;
        n = 3;
    } else if (which == 4) {
        args[1] = th_node_int(k->t, choose(k, 9));
    } else if (which == 5 || which == 6) {
        n = 1;
    } else {
        args[1] = operand(k, &view);
    }
    th_val out = 0;
    if (which != 8 && choose(k, 3)) {
        out = th_trace_value(k->t, 0, k->t->values[x].type);
        k->t->values[out].alias = group_of(k, x);
        k->t->values[out].offset = k->t->values[x].offset;
        keep(k, out);
    }
    emit(k, names[which], n, args, out ? th_node_value(k->t, out) : 0, 0, x);
}

static void make_other(maker *k) {
    th_val x = pick(k);
    machine_view v = view_of(k, x);
    th_node args[2] = {th_node_value(k->t, x)};
    th_val out;
    switch (choose(k, 4)) {
    case 0: emit(k, "torch.observe", 1, args, 0, TH_FX_STATE, 0); return;
    case 1:
        out = keep(k, th_trace_value(k->t, 0, packed_type(k, &v)));
        emit(k, "torch.draw_like", 1, args, th_node_value(k->t, out), TH_FX_RANDOM, 0);
        return;
    case 2: make_unbind(k); return;
    default: /* 1, computed */
        if (v.ndim == 0 || k->nnumbers + 2 > sizeof k->numbers / sizeof *k->numbers) return;
        out = th_trace_value(k->t, 0, th_type_plain(k->ctx, TH_TYPE_INT));
        args[1] = th_node_int(k->t, 0);
        emit(k, "torch.Tensor.size", 2, args, th_node_value(k->t, out), 0, 0);
        args[0] = th_node_value(k->t, out);
        args[1] = th_node_int(k->t, v.shape[0] - 1);
        out = th_trace_value(k->t, 0, th_type_plain(k->ctx, TH_TYPE_INT));
        emit(k, "operator.sub", 2, args, th_node_value(k->t, out), 0, 0);
        k->numbers[k->nnumbers++] = out;
    }
}

static th_trace *make_trace(maker *k) {
    static const machine_view inputs[] = {{2, {3, 4}, {4, 1}, 0}, {1, {6}, {1}, 0}, {2, {2, 3}, {1, 2}, 3},
                                          {1, {4}, {2}, 1},       {0, {0}, {0}, 0}, {1, {4}, {1}, 2}};
    k->t = th_trace_new(k->ctx, "random");
    uint32_t ninputs = 1 + choose(k, 6);
    for (uint32_t i = 0; i < ninputs; i++) {
        const machine_view *v = &inputs[i];
        th_val x = keep(k, th_trace_input(k->t, th_intern_z(k->ctx, "x"), type_of(k, v)));
        k->t->values[x].offset = v->offset;
        if (i == 5 && choose(k, 2))
            k->t->values[x].alias = group_of(k, k->t->inputs[1]); /* inputs that share storage */
    }
    for (uint32_t n = choose(k, 30); n > 0 && k->ntensors < 150; n--) {
        uint32_t which = choose(k, 12);
        if (which < 3)
            make_pure(k);
        else if (which < 6)
            make_view(k);
        else if (which < 11)
            make_write(k);
        else
            make_other(k);
    }
    th_node results[8];
    uint32_t nresults = choose(k, 6);
    for (uint32_t i = 0; i < nresults; i++) {
        bool number = k->nnumbers && choose(k, 8) == 1;
        results[i] = th_node_value(k->t, number ? k->numbers[choose(k, k->nnumbers)] : pick(k));
    }
    k->t->result = th_node_seq(k->t, TH_N_TUPLE, nresults, results);
    return k->t;
}

/* ---- check ---- */

static void passes_require(bool holds, const th_trace *before, const char *passes, const char *what) {
    char *text = NULL;
    if (holds) return;
    th_trace_print(before, &text, NULL);
    fprintf(stderr, "%s: %s (%s)\n%s", passes, what, th_ctx_error(before->ctx)->text, text ? text : "");
    abort();
}

static void choose_passes(maker *k, char passes[200]) {
    passes[0] = '\0';
    for (uint32_t n = 1 + choose(k, 6); n > 0; n--) {
        strcat(passes, th_pass_name(choose(k, 6)));
        if (n > 1) strcat(passes, ",");
    }
}

static th_trace *through_text(const th_trace *t, const char *passes) {
    th_trace *again = NULL;
    char *text = NULL;
    size_t length = 0;
    passes_require(th_trace_print(t, &text, &length) == TH_OK, t, passes, "does not print");
    passes_require(th_trace_parse(t->ctx, text, length, &again) == TH_OK, t, passes, "does not parse");
    passes_require(th_trace_equal(t, again) && th_trace_hash(t) == th_trace_hash(again), t, passes,
                   "parses as another");
    th_ctx_alloc(t->ctx, text, 0);
    return again;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    maker k = {.at = data, .end = data + size, .ctx = th_ctx_new(NULL, NULL)};
    char passes[200];
    th_trace *after = NULL;
    machine one, two;
    th_trace *before = make_trace(&k);
    choose_passes(&k, passes);
    th_fuel fuel = {.left = choose(&k, 4) == 1 ? (int64_t)choose(&k, 12) : -1};
    passes_require(th_trace_status(before) == TH_OK, before, "build", "failed");
    passes_require(th_trace_verify(before) == TH_OK, before, "build", "is not well formed");
    passes_require(th_trace_clone(before, &after) == TH_OK, before, "clone", "failed");
    passes_require(th_pipeline_run(after, passes, &fuel, true, NULL, NULL) == TH_OK, before, passes, "failed");
    th_trace *read = through_text(after, passes);
    machine_run(&one, before);
    machine_run(&two, read);
    const char *difference = machine_difference(&one, &two);
    if (difference) {
        char *text = NULL;
        th_trace_print(read, &text, NULL);
        fprintf(stderr, "last rewrite: %s\n%s", fuel.last, text ? text : "");
    }
    passes_require(!difference, before, passes, difference);
    machine_free(&one);
    machine_free(&two);
    th_trace_free(read);
    th_trace_free(after);
    th_trace_free(before);
    th_ctx_free(k.ctx);
    return 0;
}
