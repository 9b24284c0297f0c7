/* The whole C API of the core in one include. */
#ifndef THUNDER_H
#define THUNDER_H

#include "thunder/base.h"
#include "thunder/ir.h"
#include "thunder/ops.h"
#include "thunder/passes.h"

#endif
