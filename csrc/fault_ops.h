// Faults for tests: pread and pwrite that fail, lie or dawdle as a plan says.
//
// [Note: fault plan] The plan belongs to the process, and queues of backend "faults" are the only
// ones that look at it: nothing else in the process is disturbed, and the other backends do not
// know that it exists. A rule strikes either one operation, counted over all such queues from 1, or
// each one with a probability. It counts only operations that its kind can befall, so a campaign
// that raises the number by one meets every one of them. Probabilities are drawn by number from the
// seed, not from the order in which threads arrive. An operation is one attempt of one block: a
// retry, or the rest of a short transfer, is another one.
#pragma once

#include <cstdint>
#include <vector>

#include "file_ops.h"

namespace offload {

enum class FaultKind {
  kLatency,    // the operation begins up to delay_s late
  kReorder,    // it waits until up to three others have ended, or delay_s is over
  kShort,      // it moves fewer pages than asked for; befalls those of more than one page
  kEio,        // nothing moves, -EIO
  kEnospc,     // nothing is written, -ENOSPC; befalls writes
  kEintr,      // nothing moves, -EINTR
  kEagain,     // nothing moves, -EAGAIN
  kFlipRead,   // one bit of what was read is wrong; befalls reads
  kFlipWrite,  // one bit of what is written is wrong; befalls writes
  kMisplace,   // the bytes are written to another place of the file; befalls writes
  kDrop,       // nothing is written, and the file keeps what it had; befalls writes
};
constexpr int kNumFaultKinds = 11;

const char* fault_name(FaultKind kind);
bool find_fault(const char* name, FaultKind* kind);  // false where there is none of this name

struct FaultRule {
  FaultKind kind;
  uint64_t at;  // the number of the operation to strike, from 1; 0 to go by the rate
  double rate;  // 0 to 1
};

// Delays add to another fault of the same operation; of the others the first rule that strikes
// wins.
struct FaultPlan {
  std::vector<FaultRule> rules;
  uint64_t seed = 0;
  double delay_s = 0;
};

// Since the plan was set.
struct FaultCounts {
  uint64_t num_reads = 0;
  uint64_t num_writes = 0;
  uint64_t num_injected[kNumFaultKinds] = {};
};

// All may be called at any time, from any thread. Without a plan nothing is counted or disturbed;
// the counts of the last one stay.
void set_fault_plan(FaultPlan plan);
void clear_fault_plan();
FaultCounts fault_counts();

// Lives as long as the process.
FileOps& fault_file_ops();

}  // namespace offload
