/* A weight's head and parts, as matmul.h draws them, in the terms of a job. */
#include "floats.h"
#include "matmul_job.h"

#define QM_API __attribute__((visibility("default")))

static const void *part_of(const int64_t *spec, int part) {
    const int64_t *at = spec + QM_SPEC_PARTS + 2 * part;
    return at[1] ? (const char *)spec + at[0] : NULL;
}

static int64_t panel_bytes_of(int kind, int bits, int64_t groups) {
    static const uint8_t SIZES[] = {0, 4, 2, 2, 1, 1, 4};
    if (kind != QM_CODED) return groups * QM_PANEL * SIZES[kind];
    const int64_t rest = groups % QM_CHUNK_COLUMNS, chunk = 64 * bits;
    const int two_planes = bits == 3 || bits == 5 || bits == 6;
    const int64_t last = two_planes ? (rest > 0) * chunk : (rest * bits + 31) / 32 * 64;
    return groups / QM_CHUNK_COLUMNS * chunk + last;
}

static QmValues values_of(const int64_t *spec, int first, int part, const float *constants,
                          int64_t groups) {
    const int64_t *of = spec + first;
    const int kind = (int)of[QM_VALUES_KIND], bits = (int)of[QM_VALUES_BITS];
    QmValues v = {.kind = kind,
                  .lanes = (int)of[QM_VALUES_LANES],
                  .bits = bits,
                  .level = (int)of[QM_VALUES_LEVEL],
                  .level_kind = (int)of[QM_VALUES_LEVEL_KIND],
                  .size = of[QM_VALUES_SIZE],
                  .stride = of[QM_VALUES_STRIDE],
                  .panel_bytes = panel_bytes_of(kind, bits, groups),
                  .data = part_of(spec, part),
                  .table = part_of(spec, part + 1),
                  .second = part_of(spec, part + 2),
                  .step = constants[0],
                  .low = constants[1],
                  .plus = constants[2]};
    if (kind != QM_CODED) return v;
    const int low = bits == 3 ? 2 : bits == 5 || bits == 6 ? 4 : bits, high = bits - low;
    v.mask = 0x01010101u * ((1u << low) - 1);
    v.high_mask = 0x01010101u * ((1u << high) - 1);
    v.high_to = (uint8_t)low;
    for (int j = 0; j < 8; j++) {
        const int each = 8 / low, high_each = high ? 8 / high : 8;
        v.at[j] = (uint16_t)(64 * (j / each));
        v.shift[j] = (uint8_t)(low * (j % each));
        v.high_at[j] = (uint16_t)(64 * (low + j / high_each));
        v.high_shift[j] = (uint8_t)(high * (j % high_each));
    }
    return v;
}

/* The lookup as bf16, and as whole numbers where it can be: see QmFacts. */
QM_API void qm_weight_finish(void *weight) {
    const int64_t *spec = weight;
    QmFacts *facts = (QmFacts *)(uintptr_t)part_of(spec, QM_PART_FACTS);
    const int bits = (int)spec[QM_SPEC_BITS], count = 1 << bits, each = bits == 8 ? 256 : 64;
    const float *t = part_of(spec, QM_PART_LOOKUP);
    float low = t[0], high = t[0];
    int steps = 1, whole = bits < 8, mirror = bits == 8;
    double squares = 0.0, errors = 0.0;
    for (int i = 0; i < count; i++) {
        low = t[i] < low ? t[i] : low;
        high = t[i] > high ? t[i] : high;
        steps &= t[i] == t[0] + (float)i;
        whole &= t[i] > -1e6f && t[i] < 1e6f && t[i] == (float)(int)t[i];
        const float error = qm_bfloat(qm_to_bfloat(t[i])) - t[i];
        if (!(error - error == 0.0f)) continue; /* not finite */
        squares += (double)t[i] * t[i];
        errors += (double)error * error;
    }
    facts->bf16_fits = errors <= squares * (0.0011 * 0.0011);
    facts->bf16_twice = errors <= squares * (0.0010 * 0.0010);
    for (int i = 0; i < each; i++) {
        uint16_t value = qm_to_bfloat(t[i & (count - 1)]);
        facts->table[i] = (uint8_t)value;
        facts->table[each + i] = (uint8_t)(value >> 8);
        const float own = t[i & (count - 1)], twin = t[(i ^ 128) & (count - 1)];
        /* NaN has no sign to turn. */
        mirror &= own != own ? twin != twin : value == (qm_to_bfloat(twin) ^ 0x8000);
    }
    facts->numbers = mirror ? QM_MIRROR : QM_LOOKUP;
    facts->unit = 1.0f;
    facts->base = 0.0f;
    if (steps) {
        facts->numbers = QM_CODE;
        facts->base = t[0];
    } else if (whole && high - low <= 255.0f) {
        facts->numbers = QM_BYTE;
        facts->base = low;
        for (int i = 0; i < 64; i++) facts->bytes[i] = (uint8_t)(t[i & (count - 1)] - low);
    } else if (bits < 8) {
        float most = high > -low ? high : -low, unit = most / 32512.0f;
        if (!(most > 1e-30f && most < 1e30f)) return;
        for (int i = 0; i < 64; i++) {
            float number = t[i & (count - 1)] / unit;
            int rounded = (int)(number + (number < 0.0f ? -0.5f : 0.5f));
            float error = (float)rounded - number, size = number < 0.0f ? -number : number;
            /* A table with entries so far apart needs floating point. */
            if (!((error < 0.0f ? -error : error) <= size / 512.0f)) return;
            facts->bytes[i] = (uint8_t)((rounded + 32768) >> 8);
            facts->bytes[64 + i] = (uint8_t)(rounded + 32768);
        }
        facts->numbers = QM_TWO_BYTES;
        facts->unit = unit;
        facts->base = -32768.0f;
    }
}

void qm_weight_of(QmJob *job, const void *weight) {
    const int64_t *spec = weight;
    const QmFacts *facts = part_of(spec, QM_PART_FACTS);
    float constants[9];
    memcpy(constants, spec + QM_SPEC_CONSTANTS, sizeof constants);
    job->rows = spec[QM_SPEC_ROWS];
    job->columns = spec[QM_SPEC_COLUMNS];
    job->bits = (int)spec[QM_SPEC_BITS];
    job->group_units = spec[QM_SPEC_GROUP] / QM_UNIT;
    job->offset_kind = (int)spec[QM_SPEC_OFFSET_KIND];
    int64_t chunks = (job->columns + QM_CHUNK_COLUMNS - 1) / QM_CHUNK_COLUMNS;
    job->units = chunks * 2;
    int64_t size = job->group_units * QM_UNIT;
    job->groups = (job->columns + size - 1) / size;
    job->panels = (job->rows + QM_PANEL - 1) / QM_PANEL;
    job->panel_bytes = chunks * 64 * job->bits;
    job->codes = part_of(spec, QM_PART_CODES);
    job->lookup = part_of(spec, QM_PART_LOOKUP);
    job->order = part_of(spec, QM_PART_ORDER);
    job->gain = constants[0];
    job->shift = constants[1];
    job->plus = constants[2];
    job->scale = values_of(spec, QM_SPEC_SCALE, QM_PART_SCALE, constants + 3, job->groups);
    job->offset = values_of(spec, QM_SPEC_OFFSET, QM_PART_OFFSET, constants + 6, job->groups);
    job->runs = (job->group_units + QM_SEGMENT - 1) / QM_SEGMENT;
    job->numbers = facts->numbers;
    job->bf16_fits = facts->bf16_fits;
    job->bf16_twice = facts->bf16_twice;
    job->unit = facts->unit;
    job->base = facts->base;
    job->table = facts->table;
    job->bytes = facts->bytes;
}
