#include "cuda/failure.h"

#include <iomanip>
#include <iterator>
#include <sstream>

#include "core/operations.h"
#include "cuda/failure_code.h"

namespace freeio::cuda {
namespace {

constexpr const char* kSignatureNames[kSignatureWords] = {"the operation",
                                                          "the call of the program, or the program",
                                                          "num_tokens",
                                                          "top_k",
                                                          "num_experts",
                                                          "capacity",
                                                          "alignment",
                                                          "the number of CTAs",
                                                          "the dtypes or shapes of a row"};

static_assert(std::size(kOperationNames) == kBetweenHosts);

// The number may be that of an operation between hosts.
const char* operation(uint32_t number) { return kOperationNames[number % kBetweenHosts]; }

std::string rank_of_host(int rank, int host) {
  return std::to_string(rank) + " on host " + std::to_string(host) + " of the group";
}

// The value of a word of a signature; empty: it is a digest, which says nothing to a user.
std::string text_of_word(int word, uint32_t value) {
  if (word == kInstance || word == kRows) return "";
  if (word == kOp && value % kBetweenHosts < std::size(kOperationNames)) return operation(value);
  return std::to_string(value);
}

// What a rank waits for at this step.
const char* text_of(int step) {
  switch (step) {
    case kWaitSignature:
    case kWaitAddress:
      return "the beginning of the call";
    case kWaitCounts:
      return "the routing of its tokens";
    case kWaitRoutes:
      return "the rows that its tokens get";
    case kWaitRows:
      return "its tokens";
    case kWaitOwn:
      return "all parts of its kernel to start";
    case kWaitPartialSums:
      return "partial sums";
    default:
      return "the end of the call";
  }
}

const char* text_of_loss(uint32_t why) {
  switch (why) {
    case kDied:
      return " ended";
    case kLeft:
      return " left (freeio_jax.shutdown(), or the end of its program)";
    default:
      return " sent bytes that are no message of this engine";
  }
}

}  // namespace

Status to_status(const Failure& failure, double timeout, const std::string& peer_process) {
  std::string peer =
      "rank " + std::to_string(failure.peer) + (peer_process.empty() ? "" : " of " + peer_process);
  std::string rank = std::to_string(failure.rank);
  int word = failure.word;
  if (FailureCode::is_packed(failure.word)) {
    const FailureCode between = FailureCode::unpack(failure.word);
    rank = rank_of_host(between.rank, between.host);
    peer = "rank " + rank_of_host(between.peer, between.peer_host);
    word = between.word;
  } else if (failure.op >= kBetweenHosts) {
    rank += " of this host's ranks";
    peer += " of them";
  }
  std::ostringstream text;
  Code code = Code::kInternal;
  text << "freeio_jax." << operation(failure.op) << ": rank " << rank;
  switch (failure.step) {
    case kWrongDevice:
      text << " runs on mesh device " << failure.found << ", but was compiled for mesh device "
           << failure.expected
           << ". Give the mesh its devices when the call is traced: jax.set_mesh(mesh), or "
              "jax.shard_map(..., mesh=mesh).";
      break;
    case kSignatureDiffers:
      code = Code::kInvalidArgument;
      text << " and " << peer << " differ in " << kSignatureNames[word];
      if (const std::string here = text_of_word(word, failure.expected); !here.empty()) {
        text << " (" << here << " and " << text_of_word(word, failure.found) << ")";
      }
      text << ". All ranks of the expert axis must make the same calls in the same order";
      if (word == kGrid) {
        text << ", with the same num_sms (freeio_jax.config, FREEIO_NUM_SMS)";
      }
      text << ".";
      break;
    case kPeerGaveUp:
      text << ": " << peer << " gave this call up; its own error says why.";
      break;
    case kPeerLost:
      code = Code::kUnavailable;
      text << ": " << peer << text_of_loss(failure.found) << " while it was waited for.";
      break;
    default:
      code = Code::kDeadlineExceeded;
      text << " waited " << std::setprecision(4) << timeout << " s for " << peer << ", for "
           << text_of(failure.step)
           << ". All ranks of the expert axis must make the same calls in the same order. If a "
              "rank is only slow, allow more time with freeio_jax.config(timeout=seconds) or "
              "FREEIO_TIMEOUT.";
  }
  text
      << " It was exchange " << failure.epoch
      << " of these two GPUs; what it and later calls returned is not to be used, and this process "
         "can make no further exchange on this GPU: start the program again.";
  return {code, text.str()};
}

std::string to_note(const Wait& wait, double timeout, const std::string& peer_process) {
  std::ostringstream text;
  text << "freeio_jax." << operation(wait.op_and_step & 15u) << ": rank " << int{wait.rank}
       << " has waited " << seconds_of(wait) << " s (it gives up after " << std::setprecision(4)
       << timeout << " s) for rank " << int{wait.peer}
       << (peer_process.empty() ? "" : " of " + peer_process) << ", for "
       << text_of(wait.op_and_step >> 4) << ".";
  return text.str();
}

int seconds_of(const Wait& wait) {
  return static_cast<int>(static_cast<double>(wait.ticks) * (int64_t{1} << kWaitTick) * 1e-9);
}

}  // namespace freeio::cuda
