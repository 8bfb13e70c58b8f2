/* See ggml.h. hatch_build.py compiles this file once for each instruction set, with QM_LEVEL as its
 * name. No contraction: every level gives the same bytes. */
#include "ggml.h"

#include <string.h>

#include "ggml_decode.h"
#include "ggml_encode.h"
#include "levels.h"

const int QM_JOIN(qm_ggml_lanes_, QM_LEVEL) = QM_LANES;

const QmGgmlType QM_JOIN(qm_ggml_, QM_LEVEL)[QM_TYPES] = {
    [QM_Q4_0] = {32, 18, unit_q4_0, decode_q4_0},
    [QM_Q4_1] = {32, 20, unit_q4_1, decode_q4_1},
    [QM_Q5_0] = {32, 22, unit_q5_0, decode_q5_0},
    [QM_Q5_1] = {32, 24, unit_q5_1, decode_q5_1},
    [QM_Q8_0] = {32, 34, unit_q8_0, decode_q8_0},
    [QM_Q2_K] = {256, 84, unit_q2_k, decode_q2_k},
    [QM_Q3_K] = {256, 110, unit_q3_k, decode_q3_k},
    [QM_Q4_K] = {256, 144, unit_q4_k, decode_q4_k},
    [QM_Q5_K] = {256, 176, unit_q5_k, decode_q5_k},
    [QM_Q6_K] = {256, 210, unit_q6_k, decode_q6_k},
    [QM_Q8_K] = {256, 292, NULL, decode_q8_k},
    [QM_IQ2_XXS] = {256, 66, NULL, decode_iq2_xxs},
    [QM_IQ2_XS] = {256, 74, NULL, decode_iq2_xs},
    [QM_IQ3_XXS] = {256, 98, NULL, decode_iq3_xxs},
    [QM_IQ1_S] = {256, 50, NULL, decode_iq1_s},
    [QM_IQ4_NL] = {32, 18, unit_iq4_nl, decode_iq4_nl},
    [QM_IQ3_S] = {256, 110, NULL, decode_iq3_s},
    [QM_IQ2_S] = {256, 82, NULL, decode_iq2_s},
    [QM_IQ4_XS] = {256, 136, unit_iq4_xs, decode_iq4_xs},
    [QM_IQ1_M] = {256, 56, NULL, decode_iq1_m},
    [QM_TQ1_0] = {256, 54, unit_tq1_0, decode_tq1_0},
    [QM_TQ2_0] = {256, 66, unit_tq2_0, decode_tq2_0},
    [QM_MXFP4] = {32, 17, unit_mxfp4, decode_mxfp4},
    [QM_NVFP4] = {64, 36, NULL, decode_nvfp4},
    [QM_Q1_0] = {128, 18, unit_q1_0, decode_q1_0},
    [QM_Q2_0] = {64, 18, unit_q2_0, decode_q2_0},
};
