// Chunks of every format with numbers in them that training could have, and steps on them.
#pragma once

#include <vector>

#include "../../csrc/update_job.h"
#include "harness.h"

namespace offload::tests {

constexpr StateFormat kFormats[] = {StateFormat::kFp32, StateFormat::kExact, StateFormat::kBf16,
                                    StateFormat::kInt8};
constexpr RuleKind kRules[] = {RuleKind::kAdamw, RuleKind::kSgd, RuleKind::kLion};

// The plane of `numel` elements, empty where the format has none. No NaN and nothing that overflows
// to one, because the payloads of some NaNs are left open.
Memory make_plane(Dice& dice, StateFormat format, int plane, uint64_t numel);

StepRule make_step(Dice& dice, RuleKind kind, int64_t step);

// Disjoint ops over parts of a chunk, of random rules.
std::vector<UpdateOp> make_ops(Dice& dice, StateFormat format, uint64_t numel, int64_t step);

}  // namespace offload::tests
