// IoQueue: asynchronous file transfers with priorities; every transfer completes exactly once.
//
// [Note: transfers and blocks] A transfer is what a caller submits: one direction, one or more
// segments, one completion. It is cut into blocks of at most block_nbytes while it runs, so a
// submit costs the same however large it is. The base class owns the table of transfers and
// decides what runs next; a backend only takes a block, moves it, and hands back the result.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace offload {

class FileOps;

enum class Backend { kUring, kThreads, kFaults };  // kFaults: kThreads with faults, for tests

constexpr int kOpRead = 0;
constexpr int kOpWrite = 1;

constexpr uint64_t kPageNbytes = 4096;
constexpr int kPriorityDemand = 0;    // compute waits for it
constexpr int kPriorityPrefetch = 1;  // compute will wait for it
constexpr int kPriorityWriteBack = 2;

constexpr unsigned kDepthMax = 4096;
constexpr unsigned kThreadsMax = 256;
constexpr size_t kBlockNbytesMax = size_t{1} << 30;  // one system call moves less than 2 GiB

// The memory belongs to the caller and must stay valid until the transfer completes. `checksums`
// is the entry of the block at `offset` (see [Note: checksum blocks]), null to move the bytes as
// they are. With item_nbytes the segment is a run of floats that may be packed on the drive (see
// [Note: packed runs] in pack.h).
struct IoSegment {
  int fd;
  uint64_t offset;
  void* address;
  uint64_t nbytes;
  uint32_t* checksums = nullptr;
  unsigned item_nbytes = 0;
};

struct IoCompletion {
  uint64_t tag;
  int64_t result;   // bytes moved, or -errno of the first block that failed
  int fd;           // of the failure; -1 on success
  uint64_t offset;  // of the failure; 0 on success
  double seconds;   // from submit to completion
};

struct IoStats {
  uint64_t read_bytes = 0;
  uint64_t write_bytes = 0;
  uint64_t num_short = 0;      // blocks that moved in part and were continued
  uint64_t num_retries = 0;    // EINTR and EAGAIN
  uint64_t num_in_flight = 0;  // transfers submitted and not completed
};

// Where a caller's completions arrive. Several callers share a queue, so that what is urgent for
// one overtakes what is not for another. Guarded by the queue's mutex.
struct IoMailbox {
  std::vector<IoCompletion> completions;
  std::condition_variable arrived;
  bool wake = false;
};

class IoQueue {
 public:
  // Returns null and sets *error to an errno when the backend cannot start. block_nbytes must be
  // a multiple of 4096. num_threads is not used by kUring. checksum_nbytes is a multiple of 4096,
  // or 0 where no segment has checksums. pack_stride is how many entries behind a block's checksum
  // its packed length is, or 0 where nothing is packed.
  static std::unique_ptr<IoQueue> create(Backend backend, unsigned depth, size_t block_nbytes,
                                         unsigned num_threads, int* error,
                                         uint64_t checksum_nbytes = 0, uint64_t pack_stride = 0);
  virtual ~IoQueue();  // a backend's destructor calls close()
  IoQueue(const IoQueue&) = delete;
  IoQueue& operator=(const IoQueue&) = delete;

  // Queues one transfer and returns without touching the device. Lower priority values run
  // first, equal ones in order. False, and nothing queued, when the queue is closed. A segment with
  // checksums begins where a checksum block does, and ends there or at the end of its piece: a
  // write stores the checksums before the bytes leave, a read whose bytes have others fails with
  // EBADMSG and the offset of the first such block that was noticed. A run moves as one block: a
  // read unpacks it in place, a write keeps it plain.
  // It completes in `mailbox`, which must live until then; null stands for the queue's own.
  // All functions here may be called from any thread.
  bool submit(int op, uint64_t tag, int priority, const IoSegment* segments, size_t num_segments,
              IoMailbox* mailbox = nullptr);

  // Appends the completions that are there and returns how many.
  size_t poll(std::vector<IoCompletion>& completions, IoMailbox* mailbox = nullptr);

  // Like poll, but sleeps until there is at least one, the timeout is over, wake_waiter() was
  // called, or the queue is closed. One caller at a time for each mailbox.
  size_t wait(double timeout_s, std::vector<IoCompletion>& completions,
              IoMailbox* mailbox = nullptr);

  // Makes the current, or else the next, wait() that sleeps on the mailbox return early.
  void wake_waiter(IoMailbox* mailbox = nullptr);

  IoStats stats() const;
  bool is_closed() const;
  uint64_t checksum_nbytes() const { return checksum_nbytes_; }
  uint64_t pack_stride() const { return pack_stride_; }
  virtual const char* backend_name() const = 0;

  // Finishes everything submitted, because the callers' buffers are in use until then; joins the
  // threads and discards completions nobody collected from its own mailbox. Calling it again is a
  // no-op.
  void close();

 protected:
  struct Transfer;
  struct Block {
    Transfer* transfer = nullptr;
    int op = kOpRead;
    int fd = -1;
    uint64_t offset = 0;
    char* address = nullptr;
    uint64_t nbytes = 0;
    bool is_continued = false;
    unsigned num_retries = 0;       // since the last progress
    uint64_t num_moved = 0;         // bytes before `address` that are done
    uint32_t* checksums = nullptr;  // of all its bytes, also the moved ones
    unsigned item_nbytes = 0;       // of a run
    uint64_t plain_nbytes = 0;      // of a run
  };
  // What a backend does with a block after it reported the result.
  enum class Next { kDone, kIssueAgain, kIssueAgainLater };

  explicit IoQueue(size_t block_nbytes);

  // Cuts the next block in priority order; false when nothing is queued. Needs mutex_.
  bool take_block(Block* block);
  bool has_unstarted() const;  // needs mutex_
  // Stores the checksums of a block that take_block cut, before it is first issued. True if there
  // are any. Not under mutex_: it reads all bytes.
  bool seal_block(const Block& block);
  // Records a result (bytes or -errno) and moves *block to what is left of it. Verifies what was
  // read, then takes mutex_.
  Next finish_block(Block* block, int64_t result);

  // Blocks were queued where there were none: a backend that keeps taking blocks while it has
  // room for them needs no other signal. Called under mutex_, never when closing_.
  virtual void wake_backend() = 0;
  // closing_ was set: ends the threads once no block is left and frees all resources. Called once.
  virtual void join_backend() = 0;

  mutable std::mutex mutex_;
  bool closing_ = false;  // guarded by mutex_

 private:
  using Clock = std::chrono::steady_clock;

  static int error_of(const Block& block, int64_t result);
  Block cut_block(Transfer* transfer) const;
  bool is_corrupt(Block* block, int64_t result) const;
  uint64_t first_wrong(const Block& block) const;
  void record_progress(Block* block, uint64_t nbytes);
  void fail(Transfer* transfer, const Block& block, int error);
  void drop_unstarted(Transfer* transfer);
  void complete(Transfer* transfer);
  static size_t collect(IoMailbox& mailbox, std::vector<IoCompletion>& completions);
  IoMailbox& box(IoMailbox* mailbox) { return mailbox ? *mailbox : own_mailbox_; }

  const size_t block_nbytes_;
  uint64_t checksum_nbytes_ = 0;  // set before the first submit
  uint64_t pack_stride_ = 0;      // likewise
  std::mutex close_mutex_;
  // All below guarded by mutex_.
  std::list<Transfer> transfers_;
  std::map<int, std::deque<Transfer*>> ready_;  // priority -> transfers with unstarted blocks
  IoMailbox own_mailbox_;
  IoStats stats_;
  bool joined_ = false;
};

// The backends' constructors; null and *error as for IoQueue::create.
std::unique_ptr<IoQueue> create_uring_queue(unsigned depth, size_t block_nbytes, int* error);
std::unique_ptr<IoQueue> create_thread_queue(unsigned num_threads, size_t block_nbytes,
                                             FileOps& files, const char* name, int* error);

// 0 when io_uring can be used here, else -errno (EPERM in many containers, ENOSYS, ENOMEM).
int uring_probe();

// Starts a named thread that leaves the process's signals to the threads that expect them.
// Throws std::system_error when the system has no thread to give.
std::thread start_thread(const char* name, std::function<void()> run);

}  // namespace offload
