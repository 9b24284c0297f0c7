/* What several threads may do at once: run one plan, each with a frame of its own, and compile, each in a context of
 * its own. Results are checked here; `make tsan` finds what they would not show.
 *
 * The plan's slots hold counted cells, as the extension's hold tensors: the machine must drop each owned one once,
 * whether an instruction fails or not.
 */
#include "check.h"

#include "runtime/plan.h"
#include "thunder/grad.h"

#include <pthread.h>
#include <stdatomic.h>

enum { THREADS = 8, RUNS = 2000, STEPS = 60, ROUNDS = 3 };

static _Atomic int failed; /* CHECK counts without a lock: threads count here, main checks */

#define EXPECT(condition)                                                                 \
    do {                                                                                  \
        if (!(condition)) {                                                               \
            atomic_fetch_add(&failed, 1);                                                 \
            fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, __func__, #condition); \
        }                                                                                 \
    } while (0)

typedef struct thread_args {
    void *user;
    int number;
} thread_args;

static void run_threads(void *(*body)(void *), void *user) {
    pthread_t threads[THREADS];
    thread_args args[THREADS];
    int started = 0;
    atomic_store(&failed, 0);
    for (int i = 0; i < THREADS; i++) {
        args[i] = (thread_args){user, i};
        if (pthread_create(&threads[started], NULL, body, &args[i]) == 0) started++;
    }
    CHECK(started == THREADS);
    for (int i = 0; i < started; i++) pthread_join(threads[i], NULL);
    CHECK(atomic_load(&failed) == 0);
}

/* ---- one plan, many frames ---- */

typedef struct cell {
    _Atomic int references;
    int64_t value;
} cell;

typedef struct runner {
    _Atomic long live; /* cells that exist */
} runner;

typedef struct run_state {
    runner *shared;
    int fail_at; /* the step that fails, or -1 */
} run_state;

typedef struct step {
    uint32_t a, b, out, number;
} step;

static cell *cell_new(runner *r, int64_t value) {
    cell *c = malloc(sizeof *c);
    *c = (cell){1, value};
    atomic_fetch_add(&r->live, 1);
    return c;
}

static void cell_release(void *user, void *handle, void *object) {
    runner *r = user;
    cell *cells[] = {handle, object};
    for (int i = 0; i < 2; i++) {
        if (!cells[i] || atomic_fetch_sub(&cells[i]->references, 1) != 1) continue;
        free(cells[i]);
        atomic_fetch_sub(&r->live, 1);
    }
}

static int64_t combine(int64_t a, int64_t b) { return (int64_t)((uint64_t)a + 3 * (uint64_t)b); }

/* Some steps make a cell, some share an operand's. */
static int run_step(th_frame *frame, const th_instr *instr) {
    const step *s = instr->data;
    run_state *state = frame->user;
    th_slot *out = &frame->slots[s->out];
    cell *a = frame->slots[s->a].handle, *b = frame->slots[s->b].handle;
    if ((int)s->number == state->fail_at) return -1;
    if (s->number % 5 == 4) {
        atomic_fetch_add(&a->references, 1);
        *out = (th_slot){.handle = a, .owns_handle = true};
        return 0;
    }
    *out = (th_slot){.handle = cell_new(state->shared, combine(a->value, b->value)), .owns_handle = true};
    if (s->number % 7 == 6) {
        out->object = cell_new(state->shared, 0);
        out->owns_object = true;
    }
    return 0;
}

static int64_t by_hand(int64_t x, int64_t y) {
    int64_t value[STEPS + 2] = {x, y};
    for (int i = 0; i < STEPS; i++) value[i + 2] = i % 5 == 4 ? value[i] : combine(value[i], value[i + 1]);
    return value[STEPS + 1];
}

static th_plan *make_plan(th_ctx *ctx, runner *r) {
    th_plan *plan = th_plan_new(ctx, STEPS + 2, 2, cell_release, r, free);
    for (uint32_t i = 0; i < STEPS; i++) {
        step *s = malloc(sizeof *s);
        *s = (step){i, i + 1, i + 2, i};
        EXPECT(th_plan_add(plan, run_step, s, i) == TH_OK);
        if (i >= 2) EXPECT(th_plan_kill(plan, i) == TH_OK);
    }
    return plan;
}

/* The cells of the arguments are shared by all threads, as parameters are. */
typedef struct plan_test {
    const th_plan *plan;
    runner *shared;
    cell *x;
} plan_test;

static void *run_plan(void *arg) {
    const thread_args *args = arg;
    plan_test *test = args->user;
    for (int i = 0; i < RUNS; i++) {
        cell *y = cell_new(test->shared, args->number * RUNS + i);
        th_slot slots[STEPS + 2] = {{.handle = test->x}, {.handle = y}};
        run_state state = {test->shared, i % 3 == 2 ? (i + args->number) % STEPS : -1};
        th_frame frame = {.slots = slots, .user = &state, .keep = i % 6 == 5};
        int rc = th_plan_run(test->plan, &frame);
        if (state.fail_at < 0) {
            const cell *out = slots[STEPS + 1].handle;
            EXPECT(rc == 0 && out && out->value == by_hand(test->x->value, y->value));
        } else {
            EXPECT(rc == -1 && frame.failed == (uint32_t)state.fail_at);
        }
        th_plan_clear(test->plan, &frame);
        cell_release(test->shared, y, NULL);
    }
    return NULL;
}

static void threads_run_one_plan_with_their_own_frames(void) {
    th_ctx *ctx = th_ctx_new(NULL, NULL);
    runner shared = {0};
    th_plan *plan = make_plan(ctx, &shared);
    plan_test test = {plan, &shared, cell_new(&shared, 5)};
    run_threads(run_plan, &test);
    CHECK(atomic_load(&test.x->references) == 1);
    cell_release(&shared, test.x, NULL);
    CHECK(atomic_load(&shared.live) == 0);
    th_plan_free(plan);
    th_ctx_free(ctx);
}

/* A thread compiles and runs its plan while others run and free theirs: plans of one release function and user. */
static void *make_and_run_plans(void *arg) {
    const thread_args *args = arg;
    runner *shared = args->user;
    for (int i = 0; i < RUNS / 20; i++) {
        th_ctx *ctx = th_ctx_new(NULL, NULL);
        th_plan *plan = make_plan(ctx, shared);
        cell *x = cell_new(shared, i), *y = cell_new(shared, args->number);
        th_slot slots[STEPS + 2] = {{.handle = x}, {.handle = y}};
        run_state state = {shared, -1};
        th_frame frame = {.slots = slots, .user = &state};
        EXPECT(th_plan_run(plan, &frame) == 0);
        const cell *out = slots[STEPS + 1].handle;
        EXPECT(out && out->value == by_hand(i, args->number));
        th_plan_clear(plan, &frame);
        cell_release(shared, x, y);
        th_plan_free(plan);
        th_ctx_free(ctx);
    }
    return NULL;
}

static void threads_make_plans_of_their_own(void) {
    runner shared = {0};
    run_threads(make_and_run_plans, &shared);
    CHECK(atomic_load(&shared.live) == 0);
}

/* ---- one context for each thread ---- */

enum { MAX_TEXTS = 400 };

static struct {
    char *text;
    size_t length;
    char *wanted;  /* what one thread alone makes of it; NULL when it is refused */
    uint64_t hash; /* equal in every context */
} texts[MAX_TEXTS];
static int ntexts;

static th_status no_rule(void *user, const th_rule_request *request, const th_rule **rule) {
    (void)user, (void)rule;
    return th_fail(request->t->ctx, TH_DECLINED, "no rule");
}

/* Parse, optimise, print; and the derivative of a copy, for what it does to the context. */
static th_status compile(th_ctx *ctx, const char *text, size_t length, char **printed, uint64_t *hash) {
    th_trace *t = NULL, *copy = NULL;
    th_joint joint = {0};
    th_halves halves = {0};
    *printed = NULL;
    th_status status = th_trace_parse(ctx, text, length, &t);
    if (status == TH_OK) status = th_pipeline_run(t, NULL, NULL, true, NULL, NULL);
    if (status == TH_OK) status = th_trace_clone(t, &copy);
    if (status == TH_OK) *hash = th_trace_hash(t);
    if (status == TH_OK) status = th_trace_print(t, printed, NULL);
    th_trace_free(t);
    if (status == TH_OK && th_grad_join(copy, &(th_grad_options){.rules = no_rule}, &joint) == TH_OK &&
        th_grad_split(&joint, TH_REMAT_AUTO, &halves) == TH_OK)
        *hash ^= th_trace_hash(halves.backward);
    th_halves_fini(ctx, &halves);
    th_joint_fini(&joint);
    return status;
}

static void add_text(const char *path) {
    size_t length;
    char *text = check_read(path, &length), *expect = text ? strstr(text, "# EXPECT:") : NULL;
    CHECK(text && ntexts < MAX_TEXTS);
    if (!text || ntexts == MAX_TEXTS) return;
    texts[ntexts].text = text;
    texts[ntexts++].length = expect ? (size_t)(expect - text) : length;
}

/* Each thread starts elsewhere, so that different passes meet. */
static void *compile_all(void *arg) {
    const thread_args *args = arg;
    for (int round = 0; round < ROUNDS; round++) {
        th_ctx *ctx = th_ctx_new(NULL, NULL);
        for (int i = 0; i < ntexts; i++) {
            int at = (i + args->number * ntexts / THREADS) % ntexts;
            uint64_t hash = 0;
            char *printed;
            th_status status = compile(ctx, texts[at].text, texts[at].length, &printed, &hash);
            EXPECT((status == TH_OK) == (texts[at].wanted != NULL));
            if (printed && texts[at].wanted) {
                EXPECT(strcmp(printed, texts[at].wanted) == 0);
                EXPECT(hash == texts[at].hash);
            }
            th_ctx_alloc(ctx, printed, 0);
        }
        th_ctx_free(ctx);
    }
    return NULL;
}

static void threads_compile_in_contexts_of_their_own(void) {
    check_walk(THUNDER_SOURCE_DIR "/tests/ir", ".ir", add_text);
    CHECK(ntexts > 50);
    th_ctx *ctx = th_ctx_new(NULL, NULL);
    for (int i = 0; i < ntexts; i++) {
        char *printed;
        th_status status = compile(ctx, texts[i].text, texts[i].length, &printed, &texts[i].hash);
        if (status == TH_OK) texts[i].wanted = printed;
    }
    run_threads(compile_all, NULL);
    for (int i = 0; i < ntexts; i++) {
        th_ctx_alloc(ctx, texts[i].wanted, 0);
        free(texts[i].text);
    }
    th_ctx_free(ctx);
}

int main(void) {
    threads_run_one_plan_with_their_own_frames();
    threads_make_plans_of_their_own();
    threads_compile_in_contexts_of_their_own();
    return check_report("test_threads");
}
