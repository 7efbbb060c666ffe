#include "planes.h"

#include <algorithm>
#include <cstring>
#include <iterator>

namespace offload::tests {

namespace {

constexpr double kBetas[][2] = {
    {0.9, 0.999}, {0.9, 0.0}, {0.9, 0.99}, {0.9, 0.0}, {0, 0}};  // by RuleKind

bool is_float(StateFormat format, int plane) {
  const bool is_moment = plane == kExpAvg || plane == kExpAvgSq;
  return plane == kWeight || plane == kGrad || plane == kExpAvgScale || plane == kExpAvgSqScale ||
         (is_moment && format != StateFormat::kInt8);
}

bool is_positive(int plane) {
  return plane == kExpAvgSq || plane == kExpAvgScale || plane == kExpAvgSqScale;
}

}  // namespace

Memory make_plane(Dice& dice, StateFormat format, int plane, uint64_t numel) {
  const unsigned item_nbytes = plane_layout(format, plane).item_nbytes;
  Memory memory(plane_nbytes(format, plane, numel), dice());
  if (!is_float(format, plane)) {
    return memory;  // low halves and bytes: any bits
  }
  for (uint64_t i = 0; i * item_nbytes < memory.nbytes(); ++i) {
    const float magnitude = static_cast<float>(1e-3 * static_cast<double>(1 + roll(dice, 2000)));
    const float value = !is_positive(plane) && roll(dice, 2) == 0 ? -magnitude : magnitude;
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    if (item_nbytes == 4) {
      *memory.as<uint32_t>(i) = bits;
    } else {
      *memory.as<uint16_t>(i) = static_cast<uint16_t>(bits >> 16);
    }
  }
  return memory;
}

StepRule make_step(Dice& dice, RuleKind kind, int64_t step) {
  const double* betas = kBetas[static_cast<int>(kind)];
  StepHyper hyper = {};
  hyper.kind = kind;
  hyper.lr = 1e-2;
  hyper.beta1 = betas[0];
  hyper.beta2 = betas[1];
  hyper.eps = 1e-8;
  hyper.weight_decay = 0.1;
  hyper.grad_scale = 0.5;
  hyper.seed = dice();
  hyper.step = step;
  hyper.maximize = roll(dice, 2) == 0;
  hyper.nesterov = kind == RuleKind::kSgd && roll(dice, 2) == 0;
  return make_rule(hyper);
}

std::vector<UpdateOp> make_ops(Dice& dice, StateFormat format, uint64_t numel, int64_t step) {
  const uint64_t multiple = format == StateFormat::kInt8 ? kGroupNumel : 1;
  std::vector<UpdateOp> ops;
  for (uint64_t begin = roll(dice, 100) / multiple * multiple; begin < numel;) {
    const uint64_t end = std::min(numel, begin + 1 + roll(dice, numel));
    const RuleKind kind = kRules[roll(dice, std::size(kRules))];
    ops.push_back({begin, end, make_step(dice, kind, step)});
    begin = (end + roll(dice, 3000) + multiple - 1) / multiple * multiple;
  }
  return ops;
}

}  // namespace offload::tests
