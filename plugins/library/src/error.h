#pragma once

#include <sstream>
#include <stdexcept>

namespace adatsq {

/// Bad input, as one sentence: what, where, got and expected. Logged where TensorRT calls in; never leaves the library.
class Error : public std::runtime_error {
  public:
    using std::runtime_error::runtime_error;
};

/// Throws an Error made of `parts`, streamed one after the other.
template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
    std::ostringstream sentence;
    (sentence << ... << parts);
    throw Error(sentence.str());
}

}  // namespace adatsq
