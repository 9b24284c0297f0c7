#include "passes/pass.h"
th_status th_pass_functionalize(th_trace *t, th_fuel *fuel) {
    (void)t;
    (void)fuel;
    return TH_OK;
}
