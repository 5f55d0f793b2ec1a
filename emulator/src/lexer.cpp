// SPDX-License-Identifier: Apache-2.0
// The words of PTX.
#include "lexer.h"

#include <bit>
#include <cstdlib>

namespace emulator::ptx {
namespace {

bool is_letter(char c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z'); }
bool is_digit(char c) { return c >= '0' && c <= '9'; }
bool starts_name(char c) { return is_letter(c) || c == '_' || c == '$' || c == '%'; }
bool in_name(char c) { return is_letter(c) || is_digit(c) || c == '_' || c == '$'; }
int digit_value(char c) {
  if (is_digit(c)) return c - '0';
  if (c >= 'a' && c <= 'f') return c - 'a' + 10;
  if (c >= 'A' && c <= 'F') return c - 'A' + 10;
  return 99;
}

}  // namespace

void Lexer::error(const std::string& message) const {
  std::string found = at_end() ? "the end of the text" : "'" + std::string(token_.text.substr(0, 60)) + "'";
  error_at(token_.line, message + ", found " + found);
}

void Lexer::error_at(int line, const std::string& message) const {
  throw Error(name_ + ":" + std::to_string(line) + ": " + message);
}

void Lexer::skip_braces() {
  if (!is('{')) error("expected '{'");
  int depth = 1;
  while (at_ < text_.size() && depth > 0) {
    char c = text_[at_++];
    if (c == '\n') line_++;
    if (c == '{') depth++;
    if (c == '}') depth--;
  }
  if (depth > 0) error_at(line_, "expected '}', found the end of the text");
  advance();
}

void Lexer::advance() {
  size_t before = at_;
  for (;;) {
    if (at_ >= text_.size()) {
      token_ = {Token::Kind::kEnd, {}, 0, line_, false};
      return;
    }
    char c = text_[at_];
    if (c == '\n') line_++;
    if (c == ' ' || c == '\t' || c == '\r' || c == '\n' || c == '\0') {
      at_++;
    } else if (text_.compare(at_, 2, "//") == 0) {
      while (at_ < text_.size() && text_[at_] != '\n') at_++;
    } else if (text_.compare(at_, 2, "/*") == 0) {
      size_t end = text_.find("*/", at_ + 2);
      if (end == std::string_view::npos) error_at(line_, "expected the end of a comment, found the end of the text");
      for (size_t i = at_; i < end; i++) line_ += text_[i] == '\n';
      at_ = end + 2;
    } else {
      break;
    }
  }
  size_t begin = at_;
  token_ = {Token::Kind::kPunct, {}, 0, line_, begin == before && begin > 0};
  char c = text_[at_];
  char following = at_ + 1 < text_.size() ? text_[at_ + 1] : '\0';
  if (starts_name(c)) {
    token_.kind = Token::Kind::kName;
    at_++;
    while (at_ < text_.size() && in_name(text_[at_])) at_++;
  } else if (is_digit(c)) {
    number();
  } else if (c == '.' && (in_name(following))) {
    token_.kind = Token::Kind::kDotted;
    at_++;
    while (at_ < text_.size()) {
      if (in_name(text_[at_])) at_++;
      else if (text_.compare(at_, 2, "::") == 0) at_ += 2;
      else break;
    }
    token_.text = text_.substr(begin + 1, at_ - begin - 1);
    return;
  } else if (c == '"') {
    token_.kind = Token::Kind::kString;
    at_++;
    while (at_ < text_.size() && text_[at_] != '"' && text_[at_] != '\n') at_++;
    if (at_ >= text_.size() || text_[at_] != '"') error_at(line_, "expected the end of a string");
    token_.text = text_.substr(begin + 1, at_ - begin - 1);
    at_++;
    return;
  } else {
    at_++;
  }
  token_.text = text_.substr(begin, at_ - begin);
}

void Lexer::number() {
  size_t begin = at_;
  auto take_digits = [&](uint64_t base) {
    size_t first = at_;
    while (at_ < text_.size() && static_cast<uint64_t>(digit_value(text_[at_])) < base)
      token_.value = token_.value * base + static_cast<uint64_t>(digit_value(text_[at_++]));
    return at_ - first;
  };
  token_.kind = Token::Kind::kInteger;
  char second = at_ + 1 < text_.size() ? text_[at_ + 1] : '\0';
  if (text_[at_] == '0' && (second == 'x' || second == 'X')) {
    at_ += 2;
    if (take_digits(16) == 0) error_at(line_, "expected hexadecimal digits");
  } else if (text_[at_] == '0' && (second == 'f' || second == 'F' || second == 'd' || second == 'D')) {
    bool single = second == 'f' || second == 'F';
    token_.kind = single ? Token::Kind::kFloat : Token::Kind::kDouble;
    at_ += 2;
    if (take_digits(16) != (single ? 8u : 16u)) error_at(line_, "expected the hexadecimal digits of a float");
  } else if (text_[at_] == '0' && (second == 'b' || second == 'B')) {
    at_ += 2;
    if (take_digits(2) == 0) error_at(line_, "expected binary digits");
  } else {
    size_t end = at_;
    while (end < text_.size() && is_digit(text_[end])) end++;
    bool is_double = end < text_.size() && (text_[end] == '.' || text_[end] == 'e' || text_[end] == 'E');
    if (is_double && text_[end] == '.' && end + 1 < text_.size() && is_letter(text_[end + 1])) is_double = false;
    if (is_double) {
      std::string copy(text_.substr(at_, 64));
      char* stop = nullptr;
      double value = std::strtod(copy.c_str(), &stop);
      at_ += static_cast<size_t>(stop - copy.c_str());
      token_.kind = Token::Kind::kDouble;
      token_.value = std::bit_cast<uint64_t>(value);
    } else {
      take_digits(text_[at_] == '0' ? 8 : 10);
    }
  }
  if (token_.kind == Token::Kind::kInteger && at_ < text_.size() && (text_[at_] == 'U' || text_[at_] == 'u')) at_++;
  token_.text = text_.substr(begin, at_ - begin);
}

}  // namespace emulator::ptx
