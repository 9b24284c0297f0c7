/* The catalogue: the families that the build found, an index over a context's names, and binding of call arguments.
 *
 * Families are read-only tables, one per src/ops/<family>.op.c; the build writes their names into ops_families.inc. The
 * index maps an interned name to its entry by a plain array: names are interned when it is built, so references are
 * small.
 */
#include "base/ctx.h"
#include "thunder/ops.h"

#include <string.h>

#define TH_OP_FAMILY(name)                  \
    extern const th_opdef th__ops_##name[]; \
    extern const size_t th__ops_##name##_count;
#include "ops_families.inc"
#undef TH_OP_FAMILY

static const struct {
    const th_opdef *defs;
    const size_t *count;
} families[] = {
#define TH_OP_FAMILY(name) {th__ops_##name, &th__ops_##name##_count},
#include "ops_families.inc"
#undef TH_OP_FAMILY
    {NULL, NULL},
};

size_t th_catalog_size(void) {
    size_t size = 0;
    for (size_t f = 0; families[f].defs; f++) size += *families[f].count;
    return size;
}

const th_opdef *th_catalog_get(size_t index) {
    for (size_t f = 0; families[f].defs; f++) {
        if (index < *families[f].count) return &families[f].defs[index];
        index -= *families[f].count;
    }
    return NULL;
}

/* ---- index ---- */

struct th_catalog {
    th_ctx *ctx;
    const th_opdef **entries; /* by th_str of a dotted name; NULL when not catalogued */
    uint32_t cap;
    uint8_t *short_names; /* by th_str: the name is taken; only while the index is built */
    uint32_t cap_short_names;
};

static th_status reserve_zeroed(th_ctx *ctx, void *array, uint32_t *cap, th_str name, size_t size) {
    uint32_t before = *cap;
    char *data;
    if (!th__reserve(ctx, array, cap, (uint64_t)name + 1, size)) return th_ctx_error(ctx)->status;
    memcpy(&data, array, sizeof data);
    if (*cap > before) memset(data + before * size, 0, (*cap - before) * size);
    return TH_OK;
}

static th_status add_short_name(th_catalog *c, const th_opdef *def) {
    th_str name = th_intern_z(c->ctx, def->name);
    if (!name) return TH_ENOMEM;
    TRY(reserve_zeroed(c->ctx, &c->short_names, &c->cap_short_names, name, 1));
    if (c->short_names[name]) return th_fail(c->ctx, TH_EINTERNAL, "two catalogue entries are called %s", def->name);
    c->short_names[name] = 1;
    return TH_OK;
}

static th_status add_names(th_catalog *c, const th_opdef *def) {
    const char *at = def->names;
    while (*(at += strspn(at, " ")) != '\0') {
        size_t size = strcspn(at, " ");
        th_str name = th_intern(c->ctx, at, size);
        if (!name) return TH_ENOMEM;
        TRY(reserve_zeroed(c->ctx, &c->entries, &c->cap, name, sizeof *c->entries));
        if (c->entries[name]) {
            return th_fail(c->ctx, TH_EINTERNAL, "%.*s is a name of both %s and %s", (int)size, at, def->name,
                           c->entries[name]->name);
        }
        c->entries[name] = def;
        at += size;
    }
    return TH_OK;
}

static th_status add_all(th_catalog *c) {
    size_t size = th_catalog_size();
    for (size_t i = 0; i < size; i++) {
        const th_opdef *def = th_catalog_get(i);
        TRY(add_short_name(c, def));
        TRY(add_names(c, def));
    }
    return TH_OK;
}

th_status th_catalog_new(th_ctx *ctx, th_catalog **out) {
    th_catalog *c = th_ctx_alloc(ctx, NULL, sizeof *c);
    *out = NULL;
    if (!c) return th_fail(ctx, TH_ENOMEM, "out of memory");
    *c = (th_catalog){.ctx = ctx};
    th_status status = add_all(c);
    th_ctx_alloc(ctx, c->short_names, 0);
    c->short_names = NULL;
    if (status == TH_OK)
        *out = c;
    else
        th_catalog_free(c);
    return status;
}

void th_catalog_free(th_catalog *c) {
    if (!c) return;
    th_ctx_alloc(c->ctx, c->entries, 0);
    th_ctx_alloc(c->ctx, c, 0);
}

const th_opdef *th_catalog_find(const th_catalog *c, th_str dotted) {
    return dotted != 0 && dotted < c->cap ? c->entries[dotted] : NULL;
}

/* ---- binding ---- */

typedef struct param {
    const char *name;
    size_t size;
    bool keyword_only, rest, optional;
} param;

/* Split "input, *sizes, dim=None" or "input, *, out=None". Returns the number of parameters. */
static uint32_t split_params(const char *text, param params[TH_MAX_PARAMS]) {
    uint32_t count = 0;
    bool keyword_only = false;
    while (*(text += strspn(text, ", ")) != '\0' && count < TH_MAX_PARAMS) {
        size_t size = strcspn(text, ","), name = strcspn(text, ",= ");
        bool star = *text == '*';
        if (!star || name > 1) {
            params[count++] =
                (param){text + star, name - star, keyword_only, star, star || memchr(text, '=', size) != NULL};
        }
        keyword_only |= star;
        text += size;
    }
    return count;
}

static th_status bind_positional(th_call *call, const param *params, th_node args) {
    th_trace *t = call->trace;
    uint32_t given = t->nodes[args].count, first = t->nodes[args].u.kids;
    for (uint32_t i = 0; i < given; i++) {
        if (i >= call->nparams || params[i].keyword_only) return TH_DECLINED;
        if (!params[i].rest) {
            call->arg[i] = t->kids[first + i];
            continue;
        }
        th_node few[TH_MAX_OUTS]; /* the pool may move while the tuple is appended to it */
        if (given - i > sizeof few / sizeof *few) return TH_DECLINED;
        memcpy(few, t->kids + first + i, (given - i) * sizeof *few);
        call->arg[i] = th_node_seq(t, TH_N_TUPLE, given - i, few);
        return call->arg[i] ? TH_OK : th_trace_status(t);
    }
    return TH_OK;
}

static th_status bind_keyword(th_call *call, const param *params, th_node key, th_node value) {
    const th_trace *t = call->trace;
    th_str s = t->nodes[key].u.ref;
    if (t->nodes[key].kind != TH_N_STR) return TH_DECLINED;
    for (uint32_t i = 0; i < call->nparams; i++) {
        bool same = params[i].size == th_str_len(t->ctx, s) &&
                    memcmp(params[i].name, th_str_get(t->ctx, s), params[i].size) == 0;
        if (!same) continue;
        if (call->arg[i]) return TH_DECLINED;
        call->arg[i] = value;
        return TH_OK;
    }
    return TH_DECLINED;
}

th_status th_call_bind(th_call *call, const th_opdef *def, th_trace *t, th_node args, th_node kwargs) {
    param params[TH_MAX_PARAMS];
    call->trace = t;
    call->def = def;
    call->nparams = split_params(def->params, params);
    memset(call->arg, 0, sizeof call->arg);
    call->nouts = 0;
    call->outs_list = false;
    TRY(bind_positional(call, params, args));
    for (uint32_t i = 0; i + 1 < t->nodes[kwargs].count; i += 2) {
        uint32_t at = t->nodes[kwargs].u.kids + i;
        TRY(bind_keyword(call, params, t->kids[at], t->kids[at + 1]));
    }
    for (uint32_t i = 0; i < call->nparams; i++) {
        if (!call->arg[i] && !params[i].optional) return TH_DECLINED;
    }
    return TH_OK;
}
