// IoQueue under many threads: every transfer completes once, closing waits for all of them, and
// errors and faults stay where they belong.
#include <algorithm>
#include <atomic>
#include <cerrno>
#include <thread>

#include "../../csrc/fault_ops.h"
#include "harness.h"

namespace offload::tests {

namespace {

constexpr double kForeverS = 60.0;
constexpr uint64_t kRegionNbytes = 16 * kPageNbytes;

using Threads = std::vector<std::thread>;

void join(Threads& threads) {
  for (std::thread& thread : threads) {
    thread.join();
  }
}

// Waits for one transfer on a queue that nobody else uses.
IoCompletion move(IoQueue& queue, int op, const std::vector<IoSegment>& segments) {
  CHECK(queue.submit(op, 99, 0, segments.data(), segments.size()));
  std::vector<IoCompletion> rows;
  while (rows.empty()) {
    queue.wait(kForeverS, rows);
  }
  CHECK(rows.size() == 1 && rows[0].tag == 99);
  return rows[0];
}

// Cuts a region of a file and as much memory into segments of whole pages, each with a checksum.
std::vector<IoSegment> cut(Dice& dice, int fd, uint64_t offset, char* address, uint64_t nbytes,
                           uint32_t* checksums) {
  std::vector<IoSegment> segments;
  while (nbytes > 0) {
    const uint64_t piece = std::min(nbytes, (1 + roll(dice, 9)) * kPageNbytes);
    segments.push_back({fd, offset, address, piece, checksums});
    checksums += piece / kPageNbytes;
    offset += piece;
    address += piece;
    nbytes -= piece;
  }
  return segments;
}

// Counts completions by tag, whoever collects them.
class Ledger {
 public:
  explicit Ledger(size_t num_tags) : counts_(num_tags) {}

  void take(const std::vector<IoCompletion>& rows) {
    for (const IoCompletion& row : rows) {
      CHECK(row.tag < counts_.size());
      CHECK(row.result == static_cast<int64_t>(kRegionNbytes));
      CHECK(counts_[row.tag].fetch_add(1) == 0);
      num_done_.fetch_add(1);
    }
  }
  bool has(uint64_t tag) const { return counts_[tag].load() != 0; }
  size_t num_done() const { return num_done_.load(); }

 private:
  std::vector<std::atomic<int>> counts_;
  std::atomic<size_t> num_done_{0};
};

// Writes its region of the file and reads it back, again and again, sleeping for nobody but itself.
void write_and_read(IoQueue& queue, const Ledger& ledger, const File& file, uint64_t index,
                    uint64_t num_rounds) {
  Dice dice(index);
  const uint64_t offset = index * kRegionNbytes;
  std::vector<uint32_t> checksums(kRegionNbytes / kPageNbytes);
  for (uint64_t round = 0; round < num_rounds; ++round) {
    Memory out(kRegionNbytes, index * 1000 + round);
    Memory in(kRegionNbytes);
    for (const int op : {kOpWrite, kOpRead}) {
      char* address = op == kOpWrite ? out.data() : in.data();
      const auto segments = cut(dice, file.fd(), offset, address, kRegionNbytes, checksums.data());
      const uint64_t tag = (index * num_rounds + round) * 2 + static_cast<uint64_t>(op);
      const int priority = static_cast<int>(roll(dice, 3));
      CHECK(queue.submit(op, tag, priority, segments.data(), segments.size()));
      while (!ledger.has(tag)) {
        std::this_thread::yield();
      }
    }
    CHECK(in == out);
  }
}

void storm(Backend backend) {
  constexpr uint64_t kWriters = 3;
  constexpr uint64_t kRounds = 25;
  constexpr size_t kTags = kWriters * kRounds * 2;
  const File file(kWriters * kRegionNbytes);
  const auto queue = make_queue(backend);
  Ledger ledger(kTags);
  Threads threads;
  for (uint64_t i = 0; i < kWriters; ++i) {
    threads.emplace_back([&, i] { write_and_read(*queue, ledger, file, i, kRounds); });
  }
  for (int i = 0; i < 2; ++i) {
    threads.emplace_back([&, i] {
      std::vector<IoCompletion> rows;
      while (ledger.num_done() < kTags) {
        rows.clear();
        i == 0 ? queue->wait(0.05, rows) : queue->poll(rows);
        ledger.take(rows);
        const IoStats stats = queue->stats();
        CHECK(stats.num_in_flight <= kWriters);
      }
    });
  }
  threads.emplace_back([&] {
    while (ledger.num_done() < kTags) {
      queue->wake_waiter();
      std::this_thread::yield();
    }
  });
  join(threads);
  const IoStats stats = queue->stats();
  CHECK(stats.read_bytes == kTags / 2 * kRegionNbytes && stats.read_bytes == stats.write_bytes);
  queue->close();
  CHECK(queue->is_closed());
}

TEST(queue_storm) {
  for (const Backend backend : backends()) {
    storm(backend);
  }
}

TEST(queue_storm_with_faults) {
  FaultPlan plan;
  for (const FaultKind kind : {FaultKind::kShort, FaultKind::kEintr, FaultKind::kEagain,
                               FaultKind::kLatency, FaultKind::kReorder}) {
    plan.rules.push_back({kind, 0, 0.1});
  }
  plan.delay_s = 1e-3;
  set_fault_plan(plan);
  storm(Backend::kFaults);
  clear_fault_plan();
  const FaultCounts counts = fault_counts();
  for (const FaultRule& rule : plan.rules) {
    CHECK(counts.num_injected[static_cast<int>(rule.kind)] > 0);
  }
}

TEST(fault_plan_changes_while_it_is_used) {
  std::atomic<bool> done{false};
  std::thread changer([&] {
    for (uint64_t seed = 0; !done.load(); ++seed) {
      set_fault_plan({{{FaultKind::kShort, 0, 0.5}, {FaultKind::kReorder, 0, 0.1}}, seed, 1e-3});
      CHECK(fault_counts().num_injected[static_cast<int>(FaultKind::kEio)] == 0);
      clear_fault_plan();
    }
  });
  storm(Backend::kFaults);
  done = true;
  changer.join();
}

// Submits until the queue refuses, and then gives the memory back at once: nothing may use it any
// more when close() has returned.
void close_under_fire(Backend backend, uint64_t seed) {
  constexpr int kSubmitters = 2;
  const File file(kSubmitters * kRegionNbytes);
  const auto queue = make_queue(backend, 4, kPageNbytes, 2);
  std::atomic<int> num_submitted{0};
  std::atomic<int> num_collected{0};
  auto memory = std::make_unique<Memory>(kSubmitters * kRegionNbytes);
  Threads threads;
  for (int i = 0; i < kSubmitters; ++i) {
    const uint64_t offset = static_cast<uint64_t>(i) * kRegionNbytes;
    const IoSegment segment = {file.fd(), offset, memory->data() + offset, kRegionNbytes};
    threads.emplace_back([&, i, segment] {
      while (queue->submit(kOpWrite, 1, i, &segment, 1)) {
        num_submitted.fetch_add(1);
        while (queue->stats().num_in_flight > 64 && !queue->is_closed()) {
          std::this_thread::yield();  // else close() would have thousands to finish
        }
      }
    });
  }
  threads.emplace_back([&] {
    std::vector<IoCompletion> rows;
    while (!queue->is_closed()) {
      num_collected.fetch_add(static_cast<int>(queue->wait(kForeverS, rows)));
    }
  });
  const int num_wanted = static_cast<int>(seed % 20);
  while (num_submitted.load() < num_wanted) {
    std::this_thread::yield();
  }
  Threads closers;
  for (int i = 0; i < 2; ++i) {
    closers.emplace_back([&] { queue->close(); });
  }
  join(closers);
  memory.reset();
  join(threads);
  CHECK(num_collected.load() <= num_submitted.load());
  CHECK(queue->stats().num_in_flight == 0);
}

TEST(queue_close_under_fire) {
  for (const Backend backend : backends()) {
    for (uint64_t seed = 0; seed < 12; ++seed) {
      close_under_fire(backend, seed);
    }
  }
}

TEST(queue_dies_with_work_in_flight) {
  const File file(kRegionNbytes);
  for (const Backend backend : backends()) {
    for (int round = 0; round < 10; ++round) {
      Memory memory(kRegionNbytes);
      auto queue = make_queue(backend, 2, kPageNbytes, 2);
      const IoSegment segment = {file.fd(), 0, memory.data(), kRegionNbytes};
      for (uint64_t tag = 0; tag < 5; ++tag) {
        CHECK(queue->submit(kOpWrite, tag, 0, &segment, 1));
      }
      queue.reset();
    }
  }
}

TEST(queue_reports_errors_once_and_in_place) {
  const File file(kRegionNbytes);
  Memory memory(2 * kRegionNbytes);
  const int no_fd = 1 << 28;  // one that was open would be taken again by the queue itself
  for (const Backend backend : backends()) {
    const auto queue = make_queue(backend);
    const IoSegment good = {file.fd(), 0, memory.data(), kRegionNbytes};
    const IoSegment bad = {no_fd, 8192, memory.data() + kRegionNbytes, kPageNbytes};
    IoCompletion row = move(*queue, kOpRead, {good, bad});
    CHECK(row.result == -EBADF && row.fd == no_fd && row.offset == 8192);
    const IoSegment beyond = {file.fd(), 0, memory.data(), 2 * kRegionNbytes};
    row = move(*queue, kOpRead, {beyond});
    CHECK(row.result == -ENODATA && row.fd == file.fd() && row.offset >= kRegionNbytes);
    row = move(*queue, kOpRead, {});
    CHECK(row.result == 0 && row.fd == -1);
    row = move(*queue, kOpRead, {good});
    CHECK(row.result == static_cast<int64_t>(kRegionNbytes));
    queue->close();
    CHECK(!queue->submit(kOpRead, 0, 0, &good, 1));
    queue->close();
  }
}

TEST(queue_errors_of_the_plan) {
  const File file(kRegionNbytes);
  Memory memory(kRegionNbytes, 5);
  for (uint64_t number = 1; number <= 16; ++number) {
    const auto queue = make_queue(Backend::kFaults, 4, kPageNbytes, 2);
    set_fault_plan({{{FaultKind::kEio, number, 0.0}}, 0, 0.0});
    const IoCompletion row = move(*queue, kOpWrite, {{file.fd(), 0, memory.data(), kRegionNbytes}});
    CHECK(row.result == -EIO && row.fd == file.fd() && row.offset % kPageNbytes == 0);
    CHECK(fault_counts().num_injected[static_cast<int>(FaultKind::kEio)] == 1);
  }
  clear_fault_plan();
}

TEST(queue_lies_of_the_plan) {
  const File file(kRegionNbytes);
  const Memory before(kRegionNbytes, 1);
  for (const FaultKind kind :
       {FaultKind::kFlipWrite, FaultKind::kMisplace, FaultKind::kDrop, FaultKind::kFlipRead}) {
    file.write(0, before);
    Memory memory(kRegionNbytes, 2);
    const Memory wanted(kRegionNbytes, 2);
    const auto queue = make_queue(Backend::kFaults);
    set_fault_plan({{{kind, 2, 0.0}}, 7, 0.0});
    const std::vector<IoSegment> whole = {{file.fd(), 0, memory.data(), kRegionNbytes}};
    CHECK(move(*queue, kOpWrite, whole).result == static_cast<int64_t>(kRegionNbytes));
    CHECK(memory == wanted);
    CHECK((file.read(0, kRegionNbytes) == wanted) == (kind == FaultKind::kFlipRead));
    if (kind == FaultKind::kFlipRead) {
      CHECK(move(*queue, kOpRead, whole).result == static_cast<int64_t>(kRegionNbytes));
      CHECK(!(memory == wanted));
    }
    clear_fault_plan();
  }
}

// The same with checksums: whoever reads what is wrong is told where.
TEST(queue_finds_lies) {
  const File file(kRegionNbytes);
  const Memory before(kRegionNbytes, 1);
  for (const FaultKind kind :
       {FaultKind::kFlipWrite, FaultKind::kMisplace, FaultKind::kDrop, FaultKind::kFlipRead}) {
    file.write(0, before);
    Memory memory(kRegionNbytes, 2);
    std::vector<uint32_t> checksums(kRegionNbytes / kPageNbytes);
    const std::vector<IoSegment> whole = {
        {file.fd(), 0, memory.data(), kRegionNbytes, checksums.data()}};
    const auto queue = make_queue(Backend::kFaults);
    set_fault_plan({{{kind, 2, 0.0}}, 7, 0.0});
    CHECK(move(*queue, kOpWrite, whole).result == static_cast<int64_t>(kRegionNbytes));
    const IoCompletion row = move(*queue, kOpRead, whole);
    CHECK(row.result == -EBADMSG && row.fd == file.fd() && row.offset % kPageNbytes == 0);
    clear_fault_plan();
  }
}

// A wake between two waits is not lost, also when a wait of no time comes between.
TEST(queue_wake_is_kept_for_the_next_sleep) {
  for (const Backend backend : backends()) {
    const auto queue = make_queue(backend);
    std::vector<IoCompletion> rows;
    queue->wake_waiter();
    queue->wait(0.0, rows);
    queue->poll(rows);
    const auto begin = std::chrono::steady_clock::now();
    queue->wait(kForeverS, rows);
    const std::chrono::duration<double> slept = std::chrono::steady_clock::now() - begin;
    CHECK(slept.count() < kForeverS / 2 && rows.empty());
  }
}

}  // namespace

}  // namespace offload::tests
