/* See env.h. */
#include "base/env.h"

#include <stdlib.h>
#include <string.h>

const char *th_env(const char *name) {
    const char *value = getenv(name);
    return value && *value ? value : NULL;
}

bool th_env_flag(const char *name, bool fallback) {
    const char *value = th_env(name);
    if (!value) return fallback;
    return strcmp(value, "0") != 0 && strcmp(value, "off") != 0 && strcmp(value, "false") != 0 &&
           strcmp(value, "no") != 0;
}
