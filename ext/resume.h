/* Going on in one program from where another one stopped.
 *
 * A run that meets another value than expected has computed what comes before. The entry for that value begins with the
 * same operations: those whose results are still there are not run again. Which ones is found once for each pair of
 * entries and place, by comparing the two final programs.
 */
#ifndef THUNDER_RESUME_H
#define THUNDER_RESUME_H

#include "program.h"

typedef struct thx_left { /* by a run that stopped */
    uint64_t entry;       /* its number; 0: nothing is left */
    th_opref at;          /* the operation that stopped it */
    th_slot *slots;       /* owned */
    uint32_t nroots, nslots;
    void (*release)(void *user, void *handle, void *object);
    void *user;
} thx_left;

void thx_left_clear(thx_left *left);

typedef struct thx_resume {
    uint64_t entry;
    th_opref at;
    bool *skip; /* by instruction */
    struct {
        uint32_t instr, from, to; /* slots: before the instruction's turn would be over */
    } *moves;                     /* in the order of instructions */
    uint32_t nmoves;
} thx_resume;

struct thx_entry;
/* How to go on in `e` from what `from` has left: borrowed, NULL without an exception when nothing can be taken. */
const thx_resume *thx_resume_find(thx *x, struct thx_entry *e, struct thx_entry *from, th_opref at);
void thx_resumes_free(struct thx_entry *e);
/* thx_program_run, from where `resume` says with what is left there (both may be NULL); `leave`, where it is given,
 * takes over the slots of a run that ends with ValueChanged. */
int thx_program_resume(thx *x, thx_program *p, th_slot *slots, const thx_resume *resume, thx_left *from,
                       thx_left *leave);

#endif
