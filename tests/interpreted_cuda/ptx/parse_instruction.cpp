// What an instruction is called, and what its operands mean. A word that its row does not have is an error.
#include <stdexcept>

#include "parse.h"
#include "text.h"

namespace ptx {

using std::string;
using std::vector;

namespace {

// Op::none: has no effect here, where memory is of one piece and instructions end in their order.
struct Row {
  Op op;
  string types, qualifiers;
};

#define WHOLE "u16 u32 u64 s16 s32 s64 "
#define BITS "b16 b32 b64 "
#define FLOATS "f16 f16x2 bf16 bf16x2 f32 f64 "
#define COMPARISONS "eq ne lt le gt ge lo ls hi hs equ neu ltu leu gtu geu num nan "
#define SPACES "global shared shared::cta local param const "
#define ORDER "volatile relaxed acquire release acq_rel weak cta cluster gpu sys "
#define ANY "*"

const Row* row_of(const string& name) {
  static const std::map<string, Row> rows = {
      {"mov", {Op::mov, WHOLE BITS "f32 f64 pred b128", ""}},
      {"ld", {Op::load, WHOLE BITS "b8 u8 s8 f16 bf16 f32 f64 b128", SPACES ORDER "nc v2 v4 ca cg cs lu cv"}},
      {"ldu", {Op::load, WHOLE BITS "b8 u8 s8 f32 f64", "global v2 v4"}},
      {"st", {Op::store, WHOLE BITS "b8 u8 s8 f16 bf16 f32 f64 b128", SPACES ORDER "v2 v4 wb cg cs wt"}},
      {"cvta", {Op::cvta, "u32 u64", "to global shared shared::cta local const param"}},
      {"cvt", {Op::cvt, WHOLE "u8 s8 f16 bf16 f32 f64 f16x2 bf16x2 e4m3x2 e5m2x2",
               "rn rz rm rp rni rzi rmi rpi ftz sat satfinite"}},
      {"add", {Op::add, WHOLE FLOATS, "rn ftz sat"}},
      {"sub", {Op::sub, WHOLE FLOATS, "rn ftz sat"}},
      {"mul", {Op::mul, WHOLE FLOATS, "rn ftz sat lo hi wide"}},
      {"mad", {Op::mad, WHOLE "f32 f64", "rn ftz sat lo hi wide"}},
      {"fma", {Op::fma, FLOATS, "rn ftz sat"}},
      {"div", {Op::div, WHOLE "f32 f64", "rn ftz approx full"}},
      {"rem", {Op::rem, WHOLE, ""}},
      {"min", {Op::min, WHOLE FLOATS, "ftz NaN"}},
      {"max", {Op::max, WHOLE FLOATS, "ftz NaN"}},
      {"neg", {Op::neg, "s16 s32 s64 " FLOATS, "ftz"}},
      {"abs", {Op::abs, "s16 s32 s64 " FLOATS, "ftz"}},
      {"not", {Op::not_, BITS "pred", ""}},
      {"and", {Op::and_, BITS "pred", ""}},
      {"or", {Op::or_, BITS "pred", ""}},
      {"xor", {Op::xor_, BITS "pred", ""}},
      {"shl", {Op::shl, BITS, ""}},
      {"shr", {Op::shr, WHOLE BITS, ""}},
      {"setp", {Op::setp, WHOLE BITS "f16 bf16 f32 f64", COMPARISONS "and or xor ftz"}},
      {"set", {Op::set, WHOLE BITS "f16 bf16 f32 f64", COMPARISONS "ftz"}},
      {"selp", {Op::selp, WHOLE BITS "f32 f64", ""}},
      {"bfe", {Op::bfe, "u32 u64 s32 s64", ""}},
      {"bfi", {Op::bfi, "b32 b64", ""}},
      {"prmt", {Op::prmt, "b32", ""}},
      {"lop3", {Op::lop3, "b32", ""}},
      {"shf", {Op::shf, "b32", "l r wrap clamp"}},
      {"clz", {Op::clz, "b32 b64", ""}},
      {"popc", {Op::popc, "b32 b64", ""}},
      {"brev", {Op::brev, "b32 b64", ""}},
      {"copysign", {Op::copysign, "f32", ""}},
      {"ex2", {Op::ex2, FLOATS, "approx ftz"}},
      {"lg2", {Op::lg2, "f32", "approx ftz"}},
      {"rcp", {Op::rcp, "f32 f64", "approx rn ftz"}},
      {"sqrt", {Op::sqrt, "f32 f64", "approx rn ftz"}},
      {"rsqrt", {Op::rsqrt, "f32 f64", "approx ftz"}},
      {"sin", {Op::sin, "f32", "approx ftz"}},
      {"cos", {Op::cos, "f32", "approx ftz"}},
      {"tanh", {Op::tanh, FLOATS, "approx"}},
      {"bra", {Op::bra, "", "uni"}},
      {"brx", {Op::brx, "", "idx uni"}},
      {"ret", {Op::exit, "", "uni"}},
      {"exit", {Op::exit, "", ""}},
      {"trap", {Op::trap, "", ""}},
      {"brkpt", {Op::trap, "", ""}},
      {"call", {Op::call, "", "uni"}},
      {"bar", {Op::bar, "", "sync cta warp"}},
      {"barrier", {Op::bar, "", "sync cta aligned"}},
      {"atom", {Op::atom, "u32 u64 s32 s64 b32 b64 f32", SPACES ORDER "add min max and or xor exch cas inc dec"}},
      {"red", {Op::atom, "u32 u64 s32 s64 b32 b64 f32", SPACES ORDER "add min max and or xor inc dec"}},
      {"cp", {Op::cp_async, "", "async ca cg shared shared::cta global commit_group wait_group wait_all"}},
      {"ldmatrix", {Op::ldmatrix, "b16", "sync aligned m8n8 x1 x2 x4 trans shared shared::cta"}},
      {"stmatrix", {Op::stmatrix, "b16", "sync aligned m8n8 x1 x2 x4 trans shared shared::cta"}},
      {"mma", {Op::mma, "f32 f16 bf16", "sync aligned m16n8k16 m16n8k8 row col"}},
      {"shfl", {Op::shfl, "b32", "sync up down bfly idx"}},
      {"vote", {Op::vote, "pred b32", "sync all any uni ballot"}},
      {"redux", {Op::redux, "u32 s32 b32", "sync add min max and or xor"}},
      {"activemask", {Op::activemask, "b32", ""}},
      {"membar", {Op::none, "", ANY}},
      {"fence", {Op::none, "", ANY}},
      {"griddepcontrol", {Op::none, "", "wait launch_dependents"}},
      {"prefetch", {Op::none, "", ANY}},
      {"prefetchu", {Op::none, "", ANY}},
      {"nanosleep", {Op::none, "u32", ""}},
      {"createpolicy", {Op::none, "b64", ANY}},
      {"applypriority", {Op::none, "", ANY}},
      {"discard", {Op::none, "", ANY}}};
  auto found = rows.find(name);
  return found == rows.end() ? nullptr : &found->second;
}

bool has_word(const string& list, const string& word) {
  return (" " + list + " ").find(" " + word + " ") != string::npos;
}

// The place of the first of `names` among the qualifiers, or what else there is.
int place_of(const vector<string>& qualifiers, const vector<string>& names, int otherwise = -1) {
  for (size_t i = 0; i < names.size(); i++)
    for (const string& given : qualifiers)
      if (given == names[i]) return int(i);
  return otherwise;
}

Space space_of(const vector<string>& qualifiers) {
  switch (place_of(qualifiers, {"global", "shared", "shared::cta", "local", "param", "const"})) {
    case 0: return Space::global;
    case 1: case 2: return Space::shared;
    case 3: return Space::local;
    case 4: return Space::param;
    case 5: return Space::constant;
    default: return Space::generic;
  }
}

// A row says which words there are; this says which may stand together, as far as results depend on it.
bool goes_together(const Instruction& made, const vector<string>& qualifiers, const vector<Type>& types) {
  auto has = [&](const char* word) { return place_of(qualifiers, {word}) == 0; };
  switch (made.op) {
    case Op::add: case Op::sub: case Op::mul: case Op::mad: case Op::fma:
      return types.size() == 1 && (!made.saturates || made.type == Type::f32);
    case Op::cvt: {
      if (types.size() != 2) return false;
      bool makes_eight = is_eight_bit_float(made.type), makes_pair = is_packed(made.type);
      if (makes_eight) return has("rn") && has("satfinite") && (made.from == Type::f32 || made.from == Type::f16x2);
      if (is_eight_bit_float(made.from)) return has("rn") && made.type == Type::f16x2;
      if (has("satfinite") || is_packed(made.from)) return false;
      if (makes_pair) return made.from == Type::f32 && !made.saturates && (has("rn") || has("rz"));
      bool narrows = is_float(made.type) && is_float(made.from) && made.round != Round::nearest;
      if (narrows) return made.to_integral || made.round == Round::zero;
      bool is_from_whole = !is_float(made.from);
      return !is_from_whole || !is_float(made.type) || (made.round == Round::nearest && !made.saturates);
    }
    case Op::setp: return made.mode != 255;
    case Op::set: return made.mode != 255 && types.size() == 2 && !is_packed(made.from);
    case Op::bar: return has("sync") && (!has("warp") || made.op == Op::bar_warp);
    case Op::brx: return has("idx");
    case Op::atom: return made.type != Type::f32 || has("add");
    case Op::cp_async: return has("async") && has("shared") | has("shared::cta") && has("global");
    case Op::ldmatrix: case Op::stmatrix: return has("m8n8");
    case Op::mma:
      return types.size() == 4 && made.mode && has("row") && has("col") && types[1] == types[2] &&
             types[0] == types[3] && types[1] != Type::f32 && types[0] != Type::bf16;
    case Op::shfl: case Op::vote: case Op::redux: return has("sync") && made.mode != 255;
    case Op::shf: return has("l") || has("r");
    default: return true;
  }
}

const vector<string> COMPARE_WORDS = {"eq", "ne", "lt", "le", "gt", "ge", "ltu", "leu", "gtu", "geu", "equ", "neu",
                                      "num", "nan", "lo", "ls", "hi", "hs"};
const Compare COMPARE_MEANS[] = {Compare::eq, Compare::ne, Compare::lt, Compare::le, Compare::gt, Compare::ge,
                                 Compare::ltu, Compare::leu, Compare::gtu, Compare::geu, Compare::equ, Compare::neu,
                                 Compare::num, Compare::nan, Compare::lt, Compare::le, Compare::gt, Compare::ge};

uint8_t mode_of(Op op, const vector<string>& qualifiers) {
  switch (op) {
    case Op::mul: case Op::mad: return uint8_t(place_of(qualifiers, {"lo", "hi", "wide"}, 0));
    case Op::setp: case Op::set: {
      int place = place_of(qualifiers, COMPARE_WORDS);
      return place < 0 ? 255 : uint8_t(COMPARE_MEANS[place]);
    }
    case Op::shf: return uint8_t(place_of(qualifiers, {"l", "r"}, 0) + 2 * place_of(qualifiers, {"wrap", "clamp"}, 1));
    case Op::atom:
      return uint8_t(place_of(qualifiers, {"add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec"}));
    case Op::mma: return uint8_t(place_of(qualifiers, {"m16n8k16", "m16n8k8"}) == 0 ? 16 : 8);
    case Op::shfl: return uint8_t(place_of(qualifiers, {"up", "down", "bfly", "idx"}));
    case Op::vote: return uint8_t(place_of(qualifiers, {"all", "any", "uni", "ballot"}));
    case Op::redux: return uint8_t(place_of(qualifiers, {"add", "min", "max", "and", "or", "xor"}));
    default: return 0;
  }
}

// How many operands are read beside addresses; -1 where it depends.
int num_read(const Instruction& made) {
  switch (made.op) {
    case Op::neg: case Op::abs: case Op::not_: case Op::clz: case Op::popc: case Op::brev: case Op::ex2: case Op::lg2:
    case Op::rcp: case Op::sqrt: case Op::rsqrt: case Op::sin: case Op::cos: case Op::tanh: case Op::cvta:
      return 1;
    case Op::cvt: return (is_packed(made.type) || is_eight_bit_float(made.type)) && made.from == Type::f32 ? 2 : 1;
    case Op::add: case Op::sub: case Op::mul: case Op::div: case Op::rem: case Op::min: case Op::max: case Op::and_:
    case Op::or_: case Op::xor_: case Op::shl: case Op::shr: case Op::set: case Op::copysign: case Op::vote:
    case Op::redux:
      return 2;
    case Op::setp: return made.combine ? 3 : 2;
    case Op::mad: case Op::fma: case Op::selp: case Op::bfe: case Op::prmt: case Op::shf: return 3;
    case Op::bfi: case Op::lop3: case Op::shfl: return 4;
    case Op::bar_warp: return 1;
    default: return -1;
  }
}

void take_rounding(Instruction& made, const vector<string>& qualifiers) {
  int place = place_of(qualifiers, {"rn", "rz", "rm", "rp", "rni", "rzi", "rmi", "rpi"}, 0);
  made.round = Round(place % 4);
  made.to_integral = place >= 4;
}

bool has_no_effect(const vector<string>& qualifiers) {  // copies are done when they are asked for
  return place_of(qualifiers, {"commit_group", "wait_group", "wait_all"}) >= 0;
}

}  // namespace

void KernelParser::instruction(string text) {
  Instruction made;
  made.text = text.substr(0, 200);
  auto refuse = [&](const string& what) { throw std::runtime_error("PTX: " + what + " in `" + made.text + "`"); };
  try {
    if (text[0] == '@') {
      size_t end = text.find_first_of(" \t\n");
      made.guard_is_negated = text[1] == '!';
      string name = text.substr(1 + made.guard_is_negated, end - 1 - made.guard_is_negated);
      made.guard = register_of(name);
      if (made.guard < 0) refuse("no predicate " + name);
      text = trimmed(text.substr(end));
    }
    size_t end = text.find_first_of(" \t\n");
    vector<string> parts = split(text.substr(0, end), '.');
    const Row* row = row_of(parts[0]);
    if (!row) refuse("an instruction that is not known: " + parts[0]);
    vector<string> qualifiers;
    vector<Type> types;
    for (size_t i = 1; i < parts.size(); i++) {
      bool is_about_caches = begins_with(parts[i], "L1::") || begins_with(parts[i], "L2::");
      if (has_word(row->types, parts[i])) types.push_back(type_of(parts[i]));
      else if (has_word(row->qualifiers, parts[i])) qualifiers.push_back(parts[i]);
      else if (!is_about_caches && row->qualifiers != ANY) refuse("." + parts[i] + " is not known of " + parts[0]);
    }
    if (row->op == Op::none || (row->op == Op::cp_async && has_no_effect(qualifiers))) return;
    made.op = row->op;
    if (made.op == Op::bar && place_of(qualifiers, {"warp"}) == 0) made.op = Op::bar_warp;
    if (!types.empty()) {
      made.type = made.op == Op::atom ? types.back() : types[0];
      made.from = types.size() > 1 ? types[1] : types[0];
    }
    made.space = space_of(qualifiers);
    made.mode = mode_of(made.op, qualifiers);
    made.flushes = place_of(qualifiers, {"ftz"}) == 0;
    made.saturates = place_of(qualifiers, {"sat", "satfinite"}) >= 0;
    made.transposes = place_of(qualifiers, {"trans"}) == 0;
    made.keeps_nan = place_of(qualifiers, {"NaN"}) == 0;
    made.to_space = place_of(qualifiers, {"to"}) == 0;
    if (made.op == Op::setp) made.combine = uint8_t(place_of(qualifiers, {"and", "or", "xor"}) + 1);
    if (made.op == Op::cvt) take_rounding(made, qualifiers);
    if (!row->types.empty() && types.empty()) refuse("no type");
    if (!goes_together(made, qualifiers, types)) refuse("a form that is not known of " + parts[0]);
    place_operands(made, split(end == string::npos ? "" : text.substr(end), ','), types);
  } catch (const std::exception& error) {
    string what = error.what();
    if (what.find(made.text) != string::npos) throw;
    throw std::runtime_error(what + " of `" + made.text + "`");
  }
  kernel_.code.push_back(made);
}

void KernelParser::read(Instruction& made, const vector<string>& given, size_t from) {
  for (size_t i = from; i < given.size(); i++) {
    bool is_negated = false;
    made.s.push_back(operand(given[i], &is_negated));
    made.negated.push_back(is_negated);
  }
}

void KernelParser::place_operands(Instruction& made, const vector<string>& given, const vector<Type>& types) {
  auto at = [&](size_t i) -> const string& {
    if (i >= given.size()) throw std::runtime_error("PTX: too few operands");
    return given[i];
  };
  switch (made.op) {
    case Op::exit: case Op::trap: break;
    case Op::bra: jumps_.push_back({kernel_.code.size(), at(0)}); break;
    case Op::brx:
      made.s.push_back(operand(at(0)));
      table_jumps_.push_back({kernel_.code.size(), at(1)});
      break;
    case Op::call:
      if (made.text.find("vprintf") == string::npos && made.text.find("__assertfail") == string::npos)
        throw std::runtime_error("PTX: a call");
      break;
    case Op::load: made.address = address(at(1)); operands(at(0), made.d); break;
    case Op::store: made.address = address(at(0)); operands(at(1), made.s); break;
    case Op::ldmatrix: made.address = address(at(1)); operands(at(0), made.d); break;
    case Op::stmatrix: made.address = address(at(0)); operands(at(1), made.s); break;
    case Op::cp_async:
      made.address = address(at(0));
      made.source = address(at(1));
      at(2);
      read(made, given, 2);
      break;
    case Op::mov:
      if (at(1) == "%clock64" || at(1) == "%clock" || at(1) == "%globaltimer") made.op = Op::clock;
      operands(at(0), made.d);
      if (made.op == Op::mov) operands(at(1), made.s);
      break;
    case Op::atom: {
      bool gives_old = at(0)[0] != '[';  // red gives nothing
      if (gives_old) made.d.push_back(operand(at(0)));
      made.address = address(at(gives_old));
      read(made, given, 1 + gives_old);
      break;
    }
    case Op::mma:
      made.type = types[0];
      made.from = types[1];
      operands(at(0), made.d);
      for (size_t i = 1; i < 4; i++) operands(at(i), made.s);
      break;
    case Op::bar: case Op::bar_warp: read(made, given, 0); break;
    case Op::setp: case Op::shfl: {  // d|p
      size_t bar = at(0).find('|');
      made.d.push_back(operand(trimmed(at(0).substr(0, bar))));
      if (bar != string::npos) made.d.push_back(operand(trimmed(at(0).substr(bar + 1))));
      read(made, given, 1);
      break;
    }
    default:
      made.d.push_back(operand(at(0)));
      read(made, given, 1);
  }
  int wanted = num_read(made);
  if (wanted >= 0 && int(made.s.size()) != wanted) throw std::runtime_error("PTX: another number of operands");
}

}  // namespace ptx
