// The buffers of each operation's custom call, in order: arguments, results, and then the scratch
// buffers that an engine adds to the results. The device's index comes before all of them. The
// handlers of both engines read calls by these lists, and freeio_jax/primitives.py binds operands
// and results in the same order.
//
// A list visits the fields of an engine's own struct of operands, each a pointer. A visitor has
//   argument(name, field)  a buffer that the operation reads
//   rows(name, field)      likewise: the rows whose element type and width are those of the call
//   result(name, field)    a buffer that the operation writes
//   leaves(field)          a token pytree's arrays, each an argument and a result: the last
//                          arguments, and the first results
#pragma once

namespace freeio {

// The handle of an earlier dispatch. Some structs of operands have its three arrays as fields, and
// others have one field with all of them. So the functions below take `routes` as an argument of
// its own.
template <typename Routes, typename Visitor>
void visit_routes(Routes& routes, Visitor& visitor) {
  visitor.argument("dest_rank", routes.dest_rank);
  visitor.argument("dest_row", routes.dest_row);
  visitor.argument("row_source", routes.row_source);
}

template <typename Operands, typename Visitor>
void visit_dispatch(Operands& operands, Visitor& visitor) {
  visitor.argument("topk_idx", operands.topk_idx);
  visitor.leaves(operands.leaves);
  visitor.result("dest_rank", operands.dest_rank);
  visitor.result("dest_row", operands.dest_row);
  visitor.result("row_source", operands.row_source);
  visitor.result("group_sizes", operands.group_sizes);
  visitor.result("expert_load", operands.expert_load);
  visitor.result("num_dropped", operands.num_dropped);
  visitor.result("num_invalid", operands.num_invalid);
}

template <typename Routes, typename Operands, typename Visitor>
void visit_dispatch_along(Routes& routes, Operands& operands, Visitor& visitor) {
  visit_routes(routes, visitor);
  visitor.leaves(operands.leaves);
}

template <typename Routes, typename Operands, typename Visitor>
void visit_combine(Routes& routes, Operands& operands, bool weighted, Visitor& visitor) {
  visit_routes(routes, visitor);
  visitor.rows("expert_out", operands.expert_out);
  if (weighted) visitor.argument("weights", operands.weights);
  visitor.result("sums", operands.sums);
}

// `rows`, `weights`: the gradients that the call has.
template <typename Routes, typename Operands, typename Visitor>
void visit_combine_transpose(Routes& routes, Operands& operands, bool rows, bool weights,
                             Visitor& visitor) {
  visit_routes(routes, visitor);
  visitor.rows("tokens", operands.tokens);
  if (weights) visitor.argument("expert_out", operands.expert_out);
  if (rows) visitor.argument("weights", operands.weights);
  if (rows) visitor.result("rows", operands.rows);
  if (weights) visitor.result("weight_grads", operands.weight_grads);
}

}  // namespace freeio
