// SPDX-License-Identifier: Apache-2.0
// The words of PTX: identifiers, dotted words, numbers, strings, punctuation. Comments and spaces go.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "report.h"

namespace emulator::ptx {

struct Token {
  enum class Kind : uint8_t { kEnd, kName, kDotted, kInteger, kFloat, kDouble, kString, kPunct };
  Kind kind = Kind::kEnd;
  std::string_view text;
  uint64_t value = 0;
  int line = 1;
  bool adjacent = false;  // no space between it and the token before
};

class Lexer {
 public:
  Lexer(std::string_view text, const std::string& name) : text_(text), name_(name) { advance(); }

  const Token& peek() const { return token_; }
  Token next() {
    Token token = token_;
    advance();
    return token;
  }
  bool at_end() const { return token_.kind == Token::Kind::kEnd; }
  bool is(char punct) const { return token_.kind == Token::Kind::kPunct && token_.text[0] == punct; }
  bool is_dotted(std::string_view word) const { return token_.kind == Token::Kind::kDotted && token_.text == word; }
  bool take(char punct) {
    if (!is(punct)) return false;
    advance();
    return true;
  }
  bool take_dotted(std::string_view word) {
    if (!is_dotted(word)) return false;
    advance();
    return true;
  }
  void expect(char punct) {
    if (!take(punct)) error(std::string("expected '") + punct + "'");
  }
  // The token must be a name: an identifier.
  std::string expect_name(const char* what) {
    if (token_.kind != Token::Kind::kName) error(std::string("expected ") + what);
    return std::string(next().text);
  }
  int64_t expect_integer(const char* what) {
    bool negative = take('-');
    if (token_.kind != Token::Kind::kInteger) error(std::string("expected ") + what);
    uint64_t value = next().value;
    return static_cast<int64_t>(negative ? 0 - value : value);
  }
  // "name:12: expected ';', found 'foo'"
  [[noreturn]] void error(const std::string& message) const;
  [[noreturn]] void error_at(int line, const std::string& message) const;
  // Skips from a '{' that stands next to its '}', whatever is between.
  void skip_braces();

 private:
  void advance();
  void number();

  std::string_view text_;
  std::string name_;
  size_t at_ = 0;
  int line_ = 1;
  Token token_;
};

}  // namespace emulator::ptx
