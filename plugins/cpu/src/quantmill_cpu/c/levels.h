/* What is compiled once for each instruction set has the set's name at its end. Internal: no part of
 * the ABI. */
#ifndef QUANTMILL_LEVELS_H
#define QUANTMILL_LEVELS_H

#include <string.h>

#include "quantize.h"

#define QM_JOIN_(a, b) a##b
#define QM_JOIN(a, b) QM_JOIN_(a, b)

/* The address of that of the set in use. */
#ifdef QM_X86_LEVELS
#define QM_IN_USE(name)                                          \
    (strcmp(qm_level(), "avx512") == 0 ? &QM_JOIN(name, _avx512) \
     : strcmp(qm_level(), "avx2") == 0 ? &QM_JOIN(name, _avx2)   \
                                       : &QM_JOIN(name, _baseline))
#else
#define QM_IN_USE(name) (&QM_JOIN(name, _baseline))
#endif

#endif
