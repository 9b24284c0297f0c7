/* Environment variables: the only place of the project that reads one. */
#ifndef THUNDER_BASE_ENV_H
#define THUNDER_BASE_ENV_H

#include <stdbool.h>

const char *th_env(const char *name);              /* NULL when unset or empty */
bool th_env_flag(const char *name, bool fallback); /* "0", "off", "false", "no" are false; anything else is true */

#endif
