// The part of the kernel's io_uring interface that we use, so that building needs neither
// liburing nor recent kernel headers. Names and layout follow <linux/io_uring.h>.
#pragma once

#include <cstdint>

namespace offload::uring {

// The same on every architecture Linux gives new system calls to.
constexpr long kSysSetup = 425;
constexpr long kSysEnter = 426;
constexpr long kSysRegister = 427;

constexpr uint8_t kOpcodeRead = 22;
constexpr uint8_t kOpcodeWrite = 23;

constexpr uint32_t kSetupCoopTaskrun = 1u << 8;
constexpr uint32_t kSetupSingleIssuer = 1u << 12;
constexpr uint32_t kSetupDeferTaskrun = 1u << 13;
constexpr uint32_t kFeatureSingleMmap = 1u << 0;
constexpr uint32_t kFeatureNoDrop = 1u << 1;
constexpr uint32_t kEnterGetEvents = 1u << 0;
constexpr uint32_t kRegisterProbe = 8;
constexpr uint16_t kProbeSupported = 1u << 0;
constexpr int64_t kMmapRings = 0;
constexpr int64_t kMmapEntries = 0x10000000;

struct SubmissionEntry {
  uint8_t opcode;
  uint8_t flags;
  uint16_t ioprio;
  int32_t fd;
  uint64_t offset;
  uint64_t address;
  uint32_t nbytes;
  uint32_t rw_flags;
  uint64_t user_data;
  uint64_t unused[3];
};
static_assert(sizeof(SubmissionEntry) == 64, "io_uring_sqe");

struct CompletionEntry {
  uint64_t user_data;
  int32_t result;
  uint32_t flags;
};
static_assert(sizeof(CompletionEntry) == 16, "io_uring_cqe");

struct SubmissionOffsets {
  uint32_t head, tail, ring_mask, ring_entries, flags, dropped, array, reserved;
  uint64_t user_address;
};

struct CompletionOffsets {
  uint32_t head, tail, ring_mask, ring_entries, overflow, entries, flags, reserved;
  uint64_t user_address;
};

struct Params {
  uint32_t sq_entries, cq_entries, flags, sq_thread_cpu, sq_thread_idle, features, wq_fd;
  uint32_t reserved[3];
  SubmissionOffsets sq;
  CompletionOffsets cq;
};
static_assert(sizeof(Params) == 120, "io_uring_params");

struct ProbeOp {
  uint8_t op;
  uint8_t reserved;
  uint16_t flags;
  uint32_t reserved2;
};

struct Probe {
  uint8_t last_op;
  uint8_t num_ops;
  uint16_t reserved;
  uint32_t reserved2[3];
  ProbeOp ops[kOpcodeWrite + 1];
};
static_assert(sizeof(Probe) == 16 + 8 * (kOpcodeWrite + 1), "io_uring_probe");

}  // namespace offload::uring
