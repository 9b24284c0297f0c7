/* Trace -> text. The grammar is docs/ir.md; parse.c reads back every text that this file makes from a well-formed
 * trace.
 *
 * A trace that is not well formed prints too (for reports): what cannot be said prints as <...>.
 */
#include "base/text.h"
#include "ir/ir.h"

#include <string.h>

enum { LINE_WIDTH = 120 };

static void print_str(th__text *out, const th_ctx *ctx, th_str s) {
    th__text_bytes(out, th_str_get(ctx, s), th_str_len(ctx, s));
}

/* ---- types ---- */

static void print_dims(th__text *out, char open, uint32_t n, const int64_t *dims, char close) {
    th__text_char(out, open);
    for (uint32_t i = 0; i < n; i++) {
        if (i) th__text_z(out, ", ");
        th__text_int(out, dims[i]);
    }
    th__text_char(out, close);
}

void th__print_type(th__text *out, const th_ctx *ctx, th_typeref ref) {
    static const char *const plain[] = {"<none>", "", "int", "float", "bool", "object"};
    const th_type *type = th_type_get(ctx, ref);
    if (type->kind != TH_TYPE_TENSOR) {
        th__text_z(out, type->kind <= TH_TYPE_OBJECT ? plain[type->kind] : plain[0]);
        return;
    }
    th__text_z(out, th_device_type(ctx, type->device));
    if (th_device_index(ctx, type->device) >= 0) {
        th__text_char(out, ':');
        th__text_int(out, th_device_index(ctx, type->device));
    }
    th__text_char(out, ' ');
    th__text_z(out, th_dtype_get((th_dtype)type->dtype)->text);
    print_dims(out, '[', type->ndim, type->shape, ']');
    if (!type->contiguous) print_dims(out, '{', type->ndim, type->stride, '}');
    if (type->flags & TH_TYPE_REQUIRES_GRAD) th__text_z(out, " grad");
}

th_status th_type_print(const th_ctx *ctx, th_typeref type, char *buffer, size_t size) {
    th__text out = {.data = buffer, .cap = size > UINT32_MAX ? UINT32_MAX : (uint32_t)size};
    if (size) buffer[0] = '\0';
    th__print_type(&out, ctx, type);
    return out.status;
}

/* ---- nodes ---- */

static void print_node(th__text *out, const th_trace *t, th_node n);

static void print_kids(th__text *out, const th_trace *t, const th_node_data *node) {
    for (uint32_t i = 0; i < node->count; i++) {
        if (i) th__text_z(out, ", ");
        print_node(out, t, t->kids[node->u.kids + i]);
    }
}

static void print_dict(th__text *out, const th_trace *t, const th_node_data *node) {
    th__text_char(out, '{');
    for (uint32_t i = 0; i + 1 < node->count; i += 2) {
        if (i) th__text_z(out, ", ");
        print_node(out, t, t->kids[node->u.kids + i]);
        th__text_z(out, ": ");
        print_node(out, t, t->kids[node->u.kids + i + 1]);
    }
    th__text_char(out, '}');
}

static void print_device(th__text *out, const th_ctx *ctx, th_dev device) {
    th__text_z(out, "torch.device(\"");
    th__text_z(out, th_device_type(ctx, device));
    th__text_char(out, '"');
    if (th_device_index(ctx, device) >= 0) {
        th__text_z(out, ", ");
        th__text_int(out, th_device_index(ctx, device));
    }
    th__text_char(out, ')');
}

static void print_node(th__text *out, const th_trace *t, th_node n) {
    const th_node_data *node = &t->nodes[n < t->nnodes ? n : 0];
    const th_ctx *ctx = t->ctx;
    switch ((th_node_kind)node->kind) {
    case TH_N_ABSENT: th__text_z(out, "<absent>"); break;
    case TH_N_NONE: th__text_z(out, "None"); break;
    case TH_N_BOOL: th__text_z(out, node->u.i ? "True" : "False"); break;
    case TH_N_INT: th__text_int(out, node->u.i); break;
    case TH_N_FLOAT: th__text_float(out, node->u.f); break;
    case TH_N_COMPLEX:
        th__text_z(out, "complex(");
        th__text_float(out, node->u.f);
        th__text_z(out, ", ");
        th__text_float(out, node->f2);
        th__text_char(out, ')');
        break;
    case TH_N_STR: th__text_quoted(out, th_str_get(ctx, node->u.ref), th_str_len(ctx, node->u.ref)); break;
    case TH_N_DTYPE:
        th__text_z(out, "torch.");
        th__text_z(out, th_dtype_get((th_dtype)node->u.ref)->torch_name);
        break;
    case TH_N_DEVICE: print_device(out, ctx, node->u.ref); break;
    case TH_N_SYMBOL: print_str(out, ctx, node->u.ref); break;
    case TH_N_VALUE: print_str(out, ctx, t->values[node->u.ref < t->nvalues ? node->u.ref : 0].name); break;
    case TH_N_TUPLE:
        th__text_char(out, '(');
        print_kids(out, t, node);
        th__text_z(out, node->count == 1 ? ",)" : ")");
        break;
    case TH_N_LIST:
        th__text_char(out, '[');
        print_kids(out, t, node);
        th__text_char(out, ']');
        break;
    case TH_N_DICT: print_dict(out, t, node); break;
    case TH_N_SLICE:
        th__text_z(out, "slice(");
        print_kids(out, t, node);
        th__text_char(out, ')');
        break;
    case TH_N_ELLIPSIS: th__text_z(out, "..."); break;
    case TH_N_OPAQUE: print_str(out, ctx, t->opaques[node->u.ref < t->nopaques ? node->u.ref : 0].name); break;
    }
}

/* ---- annotations ---- */

static void print_facts(th__text *out, const th_trace *t, const th_value *value) {
    th__print_type(out, t->ctx, value->type);
    if (value->alias) {
        th__text_z(out, "; alias ");
        th__text_int(out, value->alias);
    }
    if (value->offset) {
        th__text_z(out, "; offset ");
        th__text_int(out, value->offset);
    }
}

static void print_effects(th__text *out, const th_trace *t, const th_op *op, const char *separator) {
    static const struct {
        uint8_t bit;
        const char *text;
    } words[] = {{TH_FX_RANDOM, "random"}, {TH_FX_STATE, "effect"}}, marks[] = {{TH_MARK_NO_GRAD, "no_grad"},
                                                                                {TH_MARK_RECOMPUTE, "recompute"},
                                                                                {TH_MARK_LATE, "late"},
                                                                                {TH_MARK_SIZED, "sized"},
                                                                                {TH_MARK_RAISES, "raises"}};
    for (size_t i = 0; i < sizeof marks / sizeof *marks; i++) {
        if (!(op->marks & marks[i].bit)) continue;
        th__text_z(out, separator);
        th__text_z(out, marks[i].text);
        separator = "; ";
    }
    for (size_t i = 0; i < sizeof words / sizeof *words; i++) {
        if (!(op->effects & words[i].bit)) continue;
        th__text_z(out, separator);
        th__text_z(out, words[i].text);
        separator = "; ";
    }
    for (uint32_t i = 0; i < op->nwrites; i++) {
        th_val v = t->kids[op->writes + i];
        th__text_z(out, i ? ", " : separator);
        if (i == 0) th__text_z(out, "writes ");
        print_str(out, t->ctx, t->values[v < t->nvalues ? v : 0].name);
    }
}

/* One bare annotation line per value of a nested tuple of outs. */
static void print_declarations(th__text *out, const th_trace *t, th_node n) {
    const th_node_data *node = &t->nodes[n];
    if (node->kind == TH_N_VALUE) {
        const th_value *value = &t->values[node->u.ref];
        th__text_z(out, "    ");
        print_str(out, t->ctx, value->name);
        th__text_z(out, ": \"");
        print_facts(out, t, value);
        th__text_z(out, "\"\n");
    }
    if (node->kind != TH_N_TUPLE) return;
    for (uint32_t i = 0; i < node->count; i++) print_declarations(out, t, t->kids[node->u.kids + i]);
}

static void print_targets(th__text *out, const th_trace *t, th_node n, bool top) {
    const th_node_data *node = &t->nodes[n];
    if (node->kind != TH_N_TUPLE) {
        if (node->kind == TH_N_NONE)
            th__text_char(out, '_');
        else
            print_node(out, t, n);
        return;
    }
    bool parens = !top || node->count < 2;
    if (parens) th__text_char(out, '(');
    for (uint32_t i = 0; i < node->count; i++) {
        if (i) th__text_z(out, ", ");
        print_targets(out, t, t->kids[node->u.kids + i], false);
    }
    if (node->count == 1) th__text_char(out, ',');
    if (parens) th__text_char(out, ')');
}

/* Everything left of the call, "t0: "..." = ", with the lines that must precede it. */
static void print_left(th__text *out, const th_trace *t, const th_op *op) {
    const th_node_data *outs = &t->nodes[op->outs < t->nnodes ? op->outs : 0];
    if (outs->kind == TH_N_TUPLE) {
        print_declarations(out, t, op->outs);
        if (op->effects || op->marks) {
            th__text_z(out, "    _: \"");
            print_effects(out, t, op, "");
            th__text_z(out, "\"\n");
        }
        th__text_z(out, "    ");
        print_targets(out, t, op->outs, true);
        th__text_z(out, " = ");
        return;
    }
    th__text_z(out, "    ");
    if (op->outs) {
        print_node(out, t, op->outs);
        th__text_z(out, ": \"");
        if (outs->kind == TH_N_VALUE && outs->u.ref < t->nvalues) print_facts(out, t, &t->values[outs->u.ref]);
        print_effects(out, t, op, "; ");
        th__text_z(out, "\" = ");
    } else if (op->effects || op->marks) {
        th__text_z(out, "_: \"");
        print_effects(out, t, op, "");
        th__text_z(out, "\" = ");
    }
}

/* ---- statements ---- */

const char *th__op_callee(const th_trace *t, const th_op *op) {
    bool opaque = op->callee_opaque != 0 && op->callee_opaque < t->nopaques;
    return th_str_get(t->ctx, opaque ? t->opaques[op->callee_opaque].name : op->callee);
}

static bool is_keyword_argument(const th_trace *t, th_node key) {
    th_str s = t->nodes[key].u.ref;
    return t->nodes[key].kind == TH_N_STR && th__name_is_identifier(th_str_get(t->ctx, s), th_str_len(t->ctx, s));
}

static void print_call(th__text *out, const th_trace *t, const th_op *op) {
    const th_node_data *args = &t->nodes[op->args], *kwargs = &t->nodes[op->kwargs];
    th__text_z(out, th__op_callee(t, op));
    th__text_char(out, '(');
    print_kids(out, t, args);
    for (uint32_t i = 0; i + 1 < kwargs->count; i += 2) {
        th_node key = t->kids[kwargs->u.kids + i], value = t->kids[kwargs->u.kids + i + 1];
        if (i || args->count) th__text_z(out, ", ");
        if (is_keyword_argument(t, key)) {
            print_str(out, t->ctx, t->nodes[key].u.ref);
            th__text_char(out, '=');
            print_node(out, t, value);
        } else { /* a keyword that Python can only pass from a dict */
            th__text_z(out, "**{");
            print_node(out, t, key);
            th__text_z(out, ": ");
            print_node(out, t, value);
            th__text_char(out, '}');
        }
    }
    th__text_char(out, ')');
}

static void print_op(th__text *out, const th_trace *t, const th_op *op) {
    if (op->kind == TH_OP_DEL) {
        th__text_z(out, "    del ");
        print_kids(out, t, &t->nodes[op->args]);
    } else {
        print_left(out, t, op);
        print_call(out, t, op);
    }
    if (op->file) {
        th__text_z(out, "  # ");
        th__text_comment(out, th_str_get(t->ctx, op->file), th_str_len(t->ctx, op->file));
        th__text_char(out, ':');
        th__text_int(out, op->line);
    }
    th__text_char(out, '\n');
}

static void print_inputs(th__text *out, const th_trace *t, const char *open, const char *separator, const char *close) {
    for (uint32_t i = 0; i < t->ninputs; i++) {
        const th_value *value = &t->values[t->inputs[i]];
        th__text_z(out, i ? separator : open);
        print_str(out, t->ctx, value->name);
        th__text_z(out, ": \"");
        print_facts(out, t, value);
        th__text_char(out, '"');
    }
    th__text_z(out, close);
}

static void print_header(th__text *out, const th_trace *t) {
    if (th_str_len(t->ctx, t->note)) {
        th__text_z(out, "# ");
        th__text_comment(out, th_str_get(t->ctx, t->note), th_str_len(t->ctx, t->note));
        th__text_char(out, '\n');
    }
    uint32_t start = out->length;
    th__text_z(out, "def ");
    print_str(out, t->ctx, t->name);
    th__text_char(out, '(');
    uint32_t inside = out->length;
    print_inputs(out, t, "", ", ", "):\n");
    if (out->length - start > LINE_WIDTH && t->ninputs && out->status == TH_OK) { /* too long: one input per line */
        out->length = inside;
        print_inputs(out, t, "\n    ", ",\n    ", ",\n):\n");
    }
}

th_status th_trace_print(const th_trace *t, char **text, size_t *length) {
    th__text out = {.ctx = t->ctx};
    *text = NULL;
    print_header(&out, t);
    for (th_opref op = 1; op < t->nops; op++) print_op(&out, t, &t->ops[op]);
    th__text_z(&out, "    return ");
    if (t->result)
        print_node(&out, t, t->result);
    else
        th__text_z(&out, "None");
    th__text_char(&out, '\n');
    th_status status = th__text_take(&out, text, length);
    th__text_fini(&out);
    return status;
}
