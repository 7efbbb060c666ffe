// The fast backend: one pump thread owns an io_uring and keeps `depth` blocks in flight.
//
// [Note: the pump] Only the pump thread touches the ring, so the kernel may defer all completion
// work to it (SINGLE_ISSUER and DEFER_TASKRUN). It sleeps in one place, io_uring_enter; a read of
// an eventfd is always on the ring, so that a submit from another thread is just one more
// completion to it.
//
// [Note: one request a block] When the kernel gets more than two entries at once, it gathers them
// before it gives them to the drive, and merges neighbours into requests of up to several MiB. They
// then complete together, so the next ones are gathered again, and a few large requests take turns
// where many were meant to overlap. bench/io.py shows what that costs. So at most two entries go to
// the kernel in one call, and each block stays a request of its own.
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <future>
#include <numeric>
#include <system_error>

#include "check.h"
#include "io_queue.h"
#include "uring_abi.h"

namespace offload {

namespace {

constexpr std::chrono::milliseconds kBusyPause{1};
constexpr uint32_t kUngatheredMax = 2;       // IO_PLUG_THRESHOLD, see [Note: one request a block]
constexpr uint64_t kWakeToken = UINT64_MAX;  // user_data of the eventfd read; others are slots

// Best first: the kernel refuses what it does not know with EINVAL.
constexpr uint32_t kSetupFlags[] = {uring::kSetupSingleIssuer | uring::kSetupDeferTaskrun,
                                    uring::kSetupCoopTaskrun, 0};

uint32_t load_acquire(const uint32_t* shared) { return __atomic_load_n(shared, __ATOMIC_ACQUIRE); }

void store_release(uint32_t* shared, uint32_t value) {
  __atomic_store_n(shared, value, __ATOMIC_RELEASE);
}

// The rings shared with the kernel. Used by the thread that opened it only.
class Ring {
 public:
  Ring() = default;
  ~Ring();
  Ring(const Ring&) = delete;
  Ring& operator=(const Ring&) = delete;

  int open(unsigned num_entries);                  // 0 or an errno
  void push(const uring::SubmissionEntry& entry);  // enters the kernel now and then
  void submit_and_wait() { enter(1); }  // till at least one completion is there, or nearly so
  void submit() { enter(0); }
  bool pop(uring::CompletionEntry* entry);

 private:
  int setup(unsigned num_entries);
  int map();
  int probe() const;
  void enter(uint32_t num_awaited);
  template <typename T>
  T* at(uint32_t offset) const {
    return reinterpret_cast<T*>(static_cast<char*>(rings_) + offset);
  }

  int fd_ = -1;
  uring::Params params_{};
  void* rings_ = MAP_FAILED;
  size_t rings_nbytes_ = 0;
  void* entries_ = MAP_FAILED;
  size_t entries_nbytes_ = 0;
  uint32_t num_unsubmitted_ = 0;
};

Ring::~Ring() {
  if (entries_ != MAP_FAILED) {
    munmap(entries_, entries_nbytes_);
  }
  if (rings_ != MAP_FAILED) {
    munmap(rings_, rings_nbytes_);
  }
  if (fd_ >= 0) {
    ::close(fd_);
  }
}

int Ring::open(unsigned num_entries) {
  int error = setup(num_entries);
  if (error == 0) {
    error = map();
  }
  return error == 0 ? probe() : error;
}

int Ring::setup(unsigned num_entries) {
  int error = ENOSYS;
  for (const uint32_t flags : kSetupFlags) {
    params_ = uring::Params{};
    params_.flags = flags;
    fd_ = static_cast<int>(syscall(uring::kSysSetup, num_entries, &params_));
    if (fd_ >= 0) {
      return 0;
    }
    error = errno;
    if (error != EINVAL) {
      break;
    }
  }
  return error;
}

int Ring::map() {
  const uint32_t needed = uring::kFeatureSingleMmap | uring::kFeatureNoDrop;
  if ((params_.features & needed) != needed) {
    return ENOSYS;
  }
  rings_nbytes_ =
      std::max<size_t>(params_.sq.array + params_.sq_entries * sizeof(uint32_t),
                       params_.cq.entries + params_.cq_entries * sizeof(uring::CompletionEntry));
  entries_nbytes_ = params_.sq_entries * sizeof(uring::SubmissionEntry);
  const int protection = PROT_READ | PROT_WRITE;
  const int flags = MAP_SHARED | MAP_POPULATE;
  rings_ = mmap(nullptr, rings_nbytes_, protection, flags, fd_, uring::kMmapRings);
  if (rings_ == MAP_FAILED) {
    return errno;
  }
  entries_ = mmap(nullptr, entries_nbytes_, protection, flags, fd_, uring::kMmapEntries);
  if (entries_ == MAP_FAILED) {
    return errno;
  }
  uint32_t* order = at<uint32_t>(params_.sq.array);
  std::iota(order, order + params_.sq_entries, 0u);  // entry i is always queued at place i
  return 0;
}

// Rings older than Linux 5.6 exist, but cannot read and write plain buffers.
int Ring::probe() const {
  uring::Probe probe{};
  const unsigned num_ops = uring::kOpcodeWrite + 1;
  if (syscall(uring::kSysRegister, fd_, uring::kRegisterProbe, &probe, num_ops) < 0) {
    return errno == EINVAL ? ENOSYS : errno;
  }
  const bool can_read = (probe.ops[uring::kOpcodeRead].flags & uring::kProbeSupported) != 0;
  const bool can_write = (probe.ops[uring::kOpcodeWrite].flags & uring::kProbeSupported) != 0;
  return can_read && can_write ? 0 : ENOSYS;
}

void Ring::push(const uring::SubmissionEntry& entry) {
  if (num_unsubmitted_ >= kUngatheredMax) {
    enter(0);
  }
  uint32_t* tail_shared = at<uint32_t>(params_.sq.tail);
  const uint32_t tail = *tail_shared;  // only this thread writes it
  CHECK(tail - load_acquire(at<uint32_t>(params_.sq.head)) < params_.sq_entries);
  static_cast<uring::SubmissionEntry*>(entries_)[tail & (params_.sq_entries - 1)] = entry;
  store_release(tail_shared, tail + 1);
  ++num_unsubmitted_;
}

void Ring::enter(uint32_t num_awaited) {
  const uint32_t flags = num_awaited > 0 ? uring::kEnterGetEvents : 0;
  const long submitted =
      syscall(uring::kSysEnter, fd_, num_unsubmitted_, num_awaited, flags, nullptr, 0);
  if (submitted >= 0) {
    num_unsubmitted_ -= static_cast<uint32_t>(submitted);
    return;
  }
  if (errno == EAGAIN || errno == EBUSY || errno == ENOMEM) {
    std::this_thread::sleep_for(kBusyPause);
  } else if (errno != EINTR) {
    // The kernel may still write into the callers' buffers, and there is no way left to learn
    // when it is done with them.
    FATAL_ERRNO("io_uring_enter", errno);
  }
}

bool Ring::pop(uring::CompletionEntry* entry) {
  uint32_t* head_shared = at<uint32_t>(params_.cq.head);
  const uint32_t head = *head_shared;  // only this thread writes it
  if (head == load_acquire(at<uint32_t>(params_.cq.tail))) {
    return false;
  }
  const auto* ring = at<uring::CompletionEntry>(params_.cq.entries);
  *entry = ring[head & (params_.cq_entries - 1)];
  store_release(head_shared, head + 1);
  return true;
}

class UringQueue final : public IoQueue {
 public:
  UringQueue(unsigned depth, size_t block_nbytes) : IoQueue(block_nbytes), slots_(depth) {
    free_slots_.resize(depth);
    std::iota(free_slots_.rbegin(), free_slots_.rend(), 0u);
  }

  ~UringQueue() override { close(); }

  const char* backend_name() const override { return "uring"; }

  // An errno when the kernel refuses the ring or the thread.
  int start() {
    wake_fd_ = eventfd(0, EFD_CLOEXEC);
    if (wake_fd_ < 0) {
      return errno;
    }
    // The thread that creates the ring must be the one that uses it: see [Note: the pump].
    try {
      pump_ = start_thread("offload-uring", [this] { run(); });
    } catch (const std::system_error& refused) {
      return refused.code().value();
    }
    return opened_.get_future().get();
  }

 private:
  void wake_backend() override {
    const uint64_t one = 1;
    while (write(wake_fd_, &one, sizeof one) < 0) {
      if (errno != EINTR) {
        FATAL_ERRNO("eventfd write", errno);  // somebody closed our descriptor
      }
    }
  }

  void join_backend() override {
    if (pump_.joinable()) {
      wake_backend();
      pump_.join();
    }
    if (wake_fd_ >= 0) {
      ::close(wake_fd_);
    }
  }

  void run() {
    Ring ring;
    const int error = ring.open(static_cast<unsigned>(slots_.size()) + 1);
    opened_.set_value(error);
    if (error != 0) {
      return;
    }
    push_wake(ring);
    for (;;) {
      issue_waiting(ring);
      const bool is_idle = free_slots_.size() == slots_.size();
      if (is_idle && !is_wake_armed_) {
        return;  // closing, and nothing was left to issue
      }
      ring.submit_and_wait();
      reap(ring);
    }
  }

  void push_wake(Ring& ring) {
    uring::SubmissionEntry entry{};
    entry.opcode = uring::kOpcodeRead;
    entry.fd = wake_fd_;
    entry.address = reinterpret_cast<uintptr_t>(&wake_count_);
    entry.nbytes = sizeof wake_count_;
    entry.user_data = kWakeToken;
    ring.push(entry);
    is_wake_armed_ = true;
  }

  void push_block(Ring& ring, unsigned slot) {
    const Block& block = slots_[slot];
    uring::SubmissionEntry entry{};
    entry.opcode = block.op == kOpRead ? uring::kOpcodeRead : uring::kOpcodeWrite;
    entry.fd = block.fd;
    entry.offset = block.offset;
    entry.address = reinterpret_cast<uintptr_t>(block.address);
    entry.nbytes = static_cast<uint32_t>(block.nbytes);
    entry.user_data = slot;
    ring.push(entry);
  }

  // Fills the free slots with what is queued.
  void issue_waiting(Ring& ring) {
    while (!free_slots_.empty() && take_next(&slots_[free_slots_.back()])) {
      const unsigned slot = free_slots_.back();
      free_slots_.pop_back();
      const bool is_sealed = seal_block(slots_[slot]);
      push_block(ring, slot);
      if (is_sealed) {
        ring.submit();  // the drive writes this one while the next checksums are computed
      }
    }
  }

  // The lock is not held while a push enters the kernel.
  bool take_next(Block* block) {
    std::lock_guard<std::mutex> lock(mutex_);
    return take_block(block);
  }

  void reap(Ring& ring) {
    bool is_busy = false;
    uring::CompletionEntry entry;
    while (ring.pop(&entry)) {
      if (entry.user_data == kWakeToken) {
        finish_wake(ring, entry.result);
      } else {
        is_busy |= finish_slot(ring, static_cast<unsigned>(entry.user_data), entry.result);
      }
    }
    if (is_busy) {
      std::this_thread::sleep_for(kBusyPause);
    }
  }

  void finish_wake(Ring& ring, int32_t result) {
    if (result < 0 && result != -EINTR && result != -EAGAIN) {
      FATAL_ERRNO("eventfd read", -result);  // without it no submit would be noticed any more
    }
    is_wake_armed_ = false;
    if (!is_closed()) {
      push_wake(ring);
    }
  }

  // True when the device asked to try again later.
  bool finish_slot(Ring& ring, unsigned slot, int32_t result) {
    const Next next = finish_block(&slots_[slot], result);
    if (next == Next::kDone) {
      free_slots_.push_back(slot);
    } else {
      push_block(ring, slot);
    }
    return next == Next::kIssueAgainLater;
  }

  int wake_fd_ = -1;
  std::thread pump_;
  std::promise<int> opened_;
  // All below belong to the pump thread.
  uint64_t wake_count_ = 0;
  bool is_wake_armed_ = false;
  std::vector<Block> slots_;  // by user_data
  std::vector<unsigned> free_slots_;
};

}  // namespace

std::unique_ptr<IoQueue> create_uring_queue(unsigned depth, size_t block_nbytes, int* error) {
  auto queue = std::make_unique<UringQueue>(depth, block_nbytes);
  *error = queue->start();
  if (*error != 0) {
    return nullptr;
  }
  return queue;
}

int uring_probe() {
  Ring ring;
  return -ring.open(1);
}

}  // namespace offload
