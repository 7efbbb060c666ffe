#include "io_queue.h"

#include <pthread.h>
#include <signal.h>
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <iterator>
#include <utility>

#include "check.h"
#include "crc32c.h"
#include "fault_ops.h"
#include "file_ops.h"
#include "pack.h"

namespace offload {

namespace {

constexpr unsigned kRetriesMax = 256;  // with 1 ms between them where the device is busy
constexpr double kWaitSecondsMax = 86400.0 * 365;  // keeps the deadline inside the clock's range

bool is_at_end_of_file(int fd, uint64_t offset) {
  struct stat status;
  return fstat(fd, &status) == 0 && static_cast<uint64_t>(status.st_size) <= offset;
}

// Blocks end on page boundaries of the file, so that direct I/O stays aligned after the first.
uint64_t first_cut(uint64_t offset, uint64_t nbytes, uint64_t block_nbytes) {
  const uint64_t end = (offset + block_nbytes) / kPageNbytes * kPageNbytes;
  return std::min(nbytes, end - offset);
}

// With checksums blocks consist of whole checksum blocks, even of one that is larger.
uint64_t checked_cut(uint64_t nbytes, uint64_t block_nbytes, uint64_t checksum_nbytes) {
  const uint64_t num_whole = std::max<uint64_t>(block_nbytes / checksum_nbytes, 1);
  return std::min(nbytes, num_whole * checksum_nbytes);
}

}  // namespace

struct IoQueue::Transfer {
  int op = kOpRead;
  uint64_t tag = 0;
  int priority = 0;
  std::vector<IoSegment> unstarted;  // last first; the segment being cut shrinks in place
  unsigned num_blocks_in_flight = 0;
  uint64_t moved_nbytes = 0;
  int error = 0;  // of the first block that failed
  int error_fd = -1;
  uint64_t error_offset = 0;
  Clock::time_point submitted;
  IoMailbox* mailbox = nullptr;
  std::list<Transfer>::iterator self;
};

std::unique_ptr<IoQueue> IoQueue::create(Backend backend, unsigned depth, size_t block_nbytes,
                                         unsigned num_threads, int* error, uint64_t checksum_nbytes,
                                         uint64_t pack_stride) {
  CHECK(depth >= 1 && depth <= kDepthMax);
  CHECK(block_nbytes >= kPageNbytes && block_nbytes <= kBlockNbytesMax);
  CHECK(block_nbytes % kPageNbytes == 0);
  CHECK(checksum_nbytes % kPageNbytes == 0 && checksum_nbytes <= kChecksumNbytesMax);
  CHECK(pack_stride == 0 || (checksum_nbytes > 0 && checksum_nbytes <= kPackBlockNbytesMax));
  CHECK(backend == Backend::kUring || (num_threads >= 1 && num_threads <= kThreadsMax));
  const bool has_faults = backend == Backend::kFaults;
  FileOps& files = has_faults ? fault_file_ops() : plain_file_ops();
  std::unique_ptr<IoQueue> queue =
      backend == Backend::kUring
          ? create_uring_queue(depth, block_nbytes, error)
          : create_thread_queue(std::min(num_threads, depth), block_nbytes, files,
                                has_faults ? "faults" : "threads", error);
  if (queue) {
    queue->checksum_nbytes_ = checksum_nbytes;
    queue->pack_stride_ = pack_stride;
  }
  return queue;
}

IoQueue::IoQueue(size_t block_nbytes) : block_nbytes_(block_nbytes) {}

IoQueue::~IoQueue() { CHECK(joined_); }

bool IoQueue::submit(int op, uint64_t tag, int priority, const IoSegment* segments,
                     size_t num_segments, IoMailbox* mailbox) {
  CHECK(op == kOpRead || op == kOpWrite);
  Transfer transfer;
  transfer.op = op;
  transfer.tag = tag;
  transfer.priority = priority;
  transfer.mailbox = &box(mailbox);
  transfer.submitted = Clock::now();
  std::copy_if(std::make_reverse_iterator(segments + num_segments),
               std::make_reverse_iterator(segments), std::back_inserter(transfer.unstarted),
               [](const IoSegment& segment) { return segment.nbytes > 0; });
  for (const IoSegment& segment : transfer.unstarted) {
    CHECK(!segment.checksums || checksum_nbytes_ > 0);
    CHECK(segment.item_nbytes == 0 ||
          (segment.checksums && pack_stride_ > 0 && segment.nbytes <= kBlockNbytesMax));
  }
  std::lock_guard<std::mutex> lock(mutex_);
  if (closing_) {
    return false;
  }
  const auto self = transfers_.insert(transfers_.end(), std::move(transfer));
  self->self = self;
  if (self->unstarted.empty()) {
    complete(&*self);
    return true;
  }
  const bool was_idle = ready_.empty();
  ready_[priority].push_back(&*self);
  if (was_idle) {
    wake_backend();
  }
  return true;
}

size_t IoQueue::poll(std::vector<IoCompletion>& completions, IoMailbox* mailbox) {
  std::lock_guard<std::mutex> lock(mutex_);
  return collect(box(mailbox), completions);
}

size_t IoQueue::wait(double timeout_s, std::vector<IoCompletion>& completions, IoMailbox* mailbox) {
  IoMailbox& own = box(mailbox);
  const double sleep_s = timeout_s > 0 ? std::min(timeout_s, kWaitSecondsMax) : 0.0;
  std::unique_lock<std::mutex> lock(mutex_);
  if (sleep_s > 0) {  // a timed wait of no time still costs a timer; and it must not eat the wake
    own.arrived.wait_for(lock, std::chrono::duration<double>(sleep_s),
                         [this, &own] { return !own.completions.empty() || own.wake || joined_; });
    own.wake = false;
  }
  return collect(own, completions);
}

void IoQueue::wake_waiter(IoMailbox* mailbox) {
  std::lock_guard<std::mutex> lock(mutex_);
  box(mailbox).wake = true;
  box(mailbox).arrived.notify_all();
}

IoStats IoQueue::stats() const {
  std::lock_guard<std::mutex> lock(mutex_);
  IoStats stats = stats_;
  stats.num_in_flight = transfers_.size();
  return stats;
}

bool IoQueue::is_closed() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return closing_;
}

void IoQueue::close() {
  std::lock_guard<std::mutex> only_one(close_mutex_);
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (joined_) {
      return;
    }
    closing_ = true;
  }
  join_backend();
  {
    std::lock_guard<std::mutex> lock(mutex_);
    CHECK(transfers_.empty() && ready_.empty());
    own_mailbox_.completions.clear();
    joined_ = true;
  }
  own_mailbox_.arrived.notify_all();
}

bool IoQueue::has_unstarted() const { return !ready_.empty(); }

bool IoQueue::take_block(Block* block) {
  if (ready_.empty()) {
    return false;
  }
  Transfer* transfer = ready_.begin()->second.front();
  *block = cut_block(transfer);
  ++transfer->num_blocks_in_flight;
  if (transfer->unstarted.empty()) {
    drop_unstarted(transfer);
  }
  return true;
}

IoQueue::Block IoQueue::cut_block(Transfer* transfer) const {
  IoSegment& segment = transfer->unstarted.back();
  Block block;
  block.transfer = transfer;
  block.op = transfer->op;
  block.fd = segment.fd;
  block.offset = segment.offset;
  block.address = static_cast<char*>(segment.address);
  block.checksums = segment.checksums;
  uint64_t cut_nbytes = 0;
  if (segment.item_nbytes > 0) {
    cut_nbytes = segment.nbytes;
    block.item_nbytes = segment.item_nbytes;
    block.plain_nbytes = segment.nbytes;
    block.nbytes = block.op == kOpWrite ? segment.nbytes
                                        : stored_nbytes(segment.checksums + pack_stride_,
                                                        segment.nbytes, checksum_nbytes_);
  } else if (segment.checksums) {
    block.nbytes = cut_nbytes = checked_cut(segment.nbytes, block_nbytes_, checksum_nbytes_);
    segment.checksums += num_checksums(block.nbytes, checksum_nbytes_);
  } else {
    block.nbytes = cut_nbytes = first_cut(segment.offset, segment.nbytes, block_nbytes_);
  }
  segment.offset += cut_nbytes;
  segment.address = block.address + cut_nbytes;
  segment.nbytes -= cut_nbytes;
  if (segment.nbytes == 0) {
    transfer->unstarted.pop_back();
  }
  return block;
}

bool IoQueue::seal_block(const Block& block) {
  if (block.op == kOpRead || !block.checksums) {
    return false;
  }
  crc32c_blocks(block.address, block.nbytes, checksum_nbytes_, block.checksums);
  if (block.item_nbytes > 0) {
    set_plain(block.checksums + pack_stride_, block.nbytes, checksum_nbytes_);
  }
  return true;
}

// Whether the block is now read whole, and unpacked, and is not what its checksums say; then *block
// is moved to the first checksum block that is wrong.
bool IoQueue::is_corrupt(Block* block, int64_t result) const {
  if (block->op != kOpRead || !block->checksums || result != static_cast<int64_t>(block->nbytes)) {
    return false;
  }
  const uint64_t wrong = first_wrong(*block);
  if (wrong == UINT64_MAX) {
    return false;
  }
  block->offset = block->offset - block->num_moved + wrong;
  return true;
}

// Where in the block's plain bytes the first wrong checksum block begins; UINT64_MAX if none does.
uint64_t IoQueue::first_wrong(const Block& block) const {
  char* const memory = block.address - block.num_moved;
  uint64_t nbytes = block.num_moved + block.nbytes;
  if (block.item_nbytes > 0) {
    nbytes = block.plain_nbytes;
    if (!unpack_run(block.item_nbytes, memory, nbytes, checksum_nbytes_,
                    block.checksums + pack_stride_)) {
      return 0;
    }
  }
  const uint64_t wrong = first_wrong_block(memory, nbytes, checksum_nbytes_, block.checksums);
  return wrong == nbytes ? UINT64_MAX : wrong;
}

// 0 for progress, else an errno.
int IoQueue::error_of(const Block& block, int64_t result) {
  if (result > 0) {
    return 0;
  }
  if (result == 0) {
    return block.op == kOpRead ? ENODATA : EIO;
  }
  // Direct I/O refuses to continue inside the last page of a file: that is its end, too.
  if (result == -EINVAL && block.op == kOpRead && block.is_continued &&
      is_at_end_of_file(block.fd, block.offset)) {
    return ENODATA;
  }
  return static_cast<int>(-result);
}

IoQueue::Next IoQueue::finish_block(Block* block, int64_t result) {
  const int error = is_corrupt(block, result) ? EBADMSG : error_of(*block, result);
  std::lock_guard<std::mutex> lock(mutex_);
  Transfer* transfer = block->transfer;
  if (error == 0) {
    record_progress(block, static_cast<uint64_t>(result));
  }
  const bool is_wanted = block->nbytes > 0 && transfer->error == 0;
  if (error == 0 && is_wanted) {  // short
    ++stats_.num_short;
    return Next::kIssueAgain;
  }
  const bool is_transient = error == EINTR || error == EAGAIN;
  if (is_transient && is_wanted && block->num_retries < kRetriesMax) {
    ++stats_.num_retries;
    ++block->num_retries;
    return error == EINTR ? Next::kIssueAgain : Next::kIssueAgainLater;
  }
  if (error != 0 && transfer->error == 0) {
    fail(transfer, *block, error);
  }
  --transfer->num_blocks_in_flight;
  if (transfer->num_blocks_in_flight == 0 && transfer->unstarted.empty()) {
    complete(transfer);
  }
  return Next::kDone;
}

void IoQueue::record_progress(Block* block, uint64_t nbytes) {
  CHECK(nbytes <= block->nbytes);
  block->offset += nbytes;
  block->address += nbytes;
  block->nbytes -= nbytes;
  block->num_moved += nbytes;
  block->is_continued = true;
  block->num_retries = 0;
  block->transfer->moved_nbytes += nbytes;
  (block->op == kOpRead ? stats_.read_bytes : stats_.write_bytes) += nbytes;
}

void IoQueue::fail(Transfer* transfer, const Block& block, int error) {
  transfer->error = error;
  transfer->error_fd = block.fd;
  transfer->error_offset = block.offset;
  if (!transfer->unstarted.empty()) {
    transfer->unstarted.clear();
    drop_unstarted(transfer);
  }
}

// Takes a transfer that has nothing left to start off the ready list.
void IoQueue::drop_unstarted(Transfer* transfer) {
  const auto level = ready_.find(transfer->priority);
  CHECK(level != ready_.end());
  std::deque<Transfer*>& queued = level->second;
  const auto position = std::find(queued.begin(), queued.end(), transfer);
  CHECK(position != queued.end());
  queued.erase(position);
  if (queued.empty()) {
    ready_.erase(level);
  }
}

void IoQueue::complete(Transfer* transfer) {
  const std::chrono::duration<double> elapsed = Clock::now() - transfer->submitted;
  IoCompletion completion;
  completion.tag = transfer->tag;
  completion.result = transfer->error != 0 ? -static_cast<int64_t>(transfer->error)
                                           : static_cast<int64_t>(transfer->moved_nbytes);
  completion.fd = transfer->error_fd;
  completion.offset = transfer->error_offset;
  completion.seconds = elapsed.count();
  transfer->mailbox->completions.push_back(completion);
  transfer->mailbox->arrived.notify_all();
  transfers_.erase(transfer->self);
}

size_t IoQueue::collect(IoMailbox& mailbox, std::vector<IoCompletion>& completions) {
  const size_t num_collected = mailbox.completions.size();
  completions.insert(completions.end(), mailbox.completions.begin(), mailbox.completions.end());
  mailbox.completions.clear();
  return num_collected;
}

std::thread start_thread(const char* name, std::function<void()> run) {
  sigset_t blocked;
  sigset_t previous;
  sigfillset(&blocked);
  for (const int fault : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT}) {
    sigdelset(&blocked, fault);  // these belong to the thread that causes them
  }
  struct MaskGuard {
    sigset_t* previous;
    ~MaskGuard() { pthread_sigmask(SIG_SETMASK, previous, nullptr); }
  } guard{&previous};
  pthread_sigmask(SIG_SETMASK, &blocked, &previous);
  std::thread thread(std::move(run));
  pthread_setname_np(thread.native_handle(), name);
  return thread;
}

}  // namespace offload
