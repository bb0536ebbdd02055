//! Makes a template pay for what it does.
//!
//! The syntax tree is rewritten before it's compiled: around each operation that can make or read through much, a filter is put that charges
//! the [`Meter`](super::meter::Meter). Their names can't be written in a template. What is cheap whatever its input (attributes, comparing
//! with a literal, `length`, `is defined`) is left as it is, and a template's meaning isn't changed.

use minijinja::machinery::ast::{self, Expr, Spanned, Stmt};
use minijinja::machinery::{Span, Token, tokenize};
use minijinja::syntax::SyntaxConfig;
use minijinja::{Error, Value};

use super::meter::Cause;

/// Charges a new value, see [`Meter::fresh`](super::meter::Meter::fresh).
pub(super) const FRESH: &str = "<fresh>";
/// The same for a text or list that is no deeper than what it was made from.
pub(super) const JOINED: &str = "<joined>";
/// Charges for reading all of a value.
pub(super) const READ: &str = "<read>";
/// The same for what goes into a namespace, which must be plain data.
pub(super) const PLAIN: &str = "<plain>";
/// Charges for what takes a value apart, an item at a time.
pub(super) const APART: &str = "<apart>";
/// Charges for reading a text and nothing for the rest.
pub(super) const TEXT: &str = "<text>";
/// Raw text of the template on its way to the output: no constant any more, so that it isn't folded into an instruction.
pub(super) const RAW: &str = "<raw>";
/// `value[start:stop:step]`, whose own form in minijinja panics on `[][::-1]`.
pub(super) const SLICE: &str = "<slice>";
/// Multiplication: minijinja would repeat a text up to 100 MB, and one of constants while compiling.
pub(super) const MUL: &str = "<mul>";

/// The longest tag, in tokens. Expressions nest as deep as they are long, and the stack is what holds them; real ones stay below 200.
const MAX_TAG: usize = 1000;
/// Each `elif` is one level deeper, too; real templates have a dozen.
const MAX_ELIF: usize = 200;
/// Each macro can hold on to the one before; real templates have a dozen.
const MAX_MACRO: usize = 200;

/// Filters whose cost doesn't depend on their input.
const CHEAP_FILTERS: &[&str] = &["length", "count", "first", "last", "default", "d"];
/// Tests whose cost doesn't depend on their input.
const CHEAP_TESTS: &[&str] = &[
    "defined",
    "undefined",
    "none",
    "string",
    "mapping",
    "sequence",
    "iterable",
    "number",
    "integer",
    "int",
    "float",
    "boolean",
    "true",
    "false",
    "odd",
    "even",
    "divisibleby",
];

/// Refuses what would need too deep a stack to compile.
pub(super) fn check_shape(source: &str, syntax: &SyntaxConfig) -> Result<(), Error> {
    let (mut in_tag, mut elifs, mut macros) = (0, 0, 0);
    let mut starts = false;
    for token in tokenize(source, false, syntax.clone()) {
        let (token, span) = token?;
        let too_many = |what: &str, most: usize| {
            let detail = format!("{what}; at most {most} are taken");
            Err(Cause::Unsupported { line: span.start_line.into(), detail }.into())
        };
        match token {
            Token::BlockStart | Token::VariableStart => in_tag = 0,
            Token::Ident("elif") if starts => elifs += 1,
            Token::Ident("macro" | "call") if starts => macros += 1,
            _ => in_tag += 1,
        }
        starts = matches!(token, Token::BlockStart);
        if in_tag > MAX_TAG {
            return too_many("a tag of too many words and signs", MAX_TAG);
        }
        if elifs > MAX_ELIF {
            return too_many("too many `elif`", MAX_ELIF);
        }
        if macros > MAX_MACRO {
            return too_many("too many macros", MAX_MACRO);
        }
    }
    Ok(())
}

/// The same template, metered.
pub(super) fn meter<'a>(template: &Stmt<'a>) -> Result<Stmt<'a>, Error> {
    stmt(template)
}

fn node<T>(inner: T, span: Span) -> Spanned<T> {
    Spanned::new(inner, span)
}

/// `value | name`
fn through<'a>(name: &'static str, value: Expr<'a>) -> Expr<'a> {
    let span = value.span();
    Expr::Filter(node(ast::Filter { name, expr: Some(value), args: Vec::new() }, span))
}

fn stmts<'a>(list: &[Stmt<'a>]) -> Result<Vec<Stmt<'a>>, Error> {
    list.iter().map(stmt).collect()
}

fn exprs<'a>(list: &[Expr<'a>]) -> Vec<Expr<'a>> {
    list.iter().map(expr).collect()
}

fn stmt<'a>(s: &Stmt<'a>) -> Result<Stmt<'a>, Error> {
    Ok(match s {
        Stmt::Template(t) => Stmt::Template(node(ast::Template { children: stmts(&t.children)? }, t.span())),
        Stmt::EmitExpr(e) => Stmt::EmitExpr(node(ast::EmitExpr { expr: emitted(&e.expr) }, e.span())),
        Stmt::EmitRaw(r) => {
            // As an expression, so that it passes the formatter, which charges for all output.
            let text = Expr::Const(node(ast::Const { value: Value::from(r.raw) }, r.span()));
            Stmt::EmitExpr(node(ast::EmitExpr { expr: through(RAW, text) }, r.span()))
        }
        Stmt::ForLoop(f) => Stmt::ForLoop(node(
            ast::ForLoop {
                target: target(&f.target),
                iter: through(APART, expr(&f.iter)),
                filter_expr: f.filter_expr.as_ref().map(expr),
                recursive: f.recursive,
                body: stmts(&f.body)?,
                else_body: stmts(&f.else_body)?,
            },
            f.span(),
        )),
        Stmt::IfCond(c) => Stmt::IfCond(node(
            ast::IfCond { expr: expr(&c.expr), true_body: stmts(&c.true_body)?, false_body: stmts(&c.false_body)? },
            c.span(),
        )),
        Stmt::WithBlock(w) => {
            let assignments = w.assignments.iter().map(|(to, from)| (target(to), assigned(to, from))).collect();
            Stmt::WithBlock(node(ast::WithBlock { assignments, body: stmts(&w.body)? }, w.span()))
        }
        Stmt::Set(s) => {
            Stmt::Set(node(ast::Set { target: target(&s.target), expr: assigned(&s.target, &s.expr) }, s.span()))
        }
        Stmt::SetBlock(s) => Stmt::SetBlock(node(
            ast::SetBlock { target: target(&s.target), filter: s.filter.as_ref().map(expr), body: stmts(&s.body)? },
            s.span(),
        )),
        Stmt::FilterBlock(f) => {
            Stmt::FilterBlock(node(ast::FilterBlock { filter: expr(&f.filter), body: stmts(&f.body)? }, f.span()))
        }
        Stmt::Macro(m) => Stmt::Macro(macro_decl(m)?),
        Stmt::CallBlock(c) => Stmt::CallBlock(node(
            ast::CallBlock { call: call(&c.call), macro_decl: macro_decl(&c.macro_decl)? },
            c.span(),
        )),
        Stmt::Continue(c) => Stmt::Continue(node(ast::Continue, c.span())),
        Stmt::Break(b) => Stmt::Break(node(ast::Break, b.span())),
        Stmt::Do(d) => Stmt::Do(node(ast::Do { call: call(&d.call) }, d.span())),
        Stmt::AutoEscape(a) => return unsupported("autoescape", a.span()),
        Stmt::Block(b) => return unsupported("block", b.span()),
        Stmt::Import(i) => return unsupported("import", i.span()),
        Stmt::FromImport(i) => return unsupported("from", i.span()),
        Stmt::Extends(e) => return unsupported("extends", e.span()),
        Stmt::Include(i) => return unsupported("include", i.span()),
    })
}

fn unsupported<'a>(what: &str, span: Span) -> Result<Stmt<'a>, Error> {
    let detail = format!("a chat template stands alone and can't use `{what}`");
    Err(Cause::Unsupported { line: span.start_line.into(), detail }.into())
}

fn macro_decl<'a>(m: &Spanned<ast::Macro<'a>>) -> Result<Spanned<ast::Macro<'a>>, Error> {
    // The arguments are names to be bound, which must stay as they are.
    let args = m.args.iter().map(target).collect();
    Ok(node(ast::Macro { name: m.name, args, defaults: exprs(&m.defaults), body: stmts(&m.body)? }, m.span()))
}

/// Something that is assigned to: names, attributes, lists of them. Nothing in it is an operation.
fn target<'a>(t: &Expr<'a>) -> Expr<'a> {
    match t {
        Expr::List(l) => Expr::List(node(ast::List { items: l.items.iter().map(target).collect() }, l.span())),
        other => expr(other),
    }
}

fn assigned<'a>(to: &Expr<'a>, from: &Expr<'a>) -> Expr<'a> {
    // Only an attribute of a namespace can be assigned to, and only a namespace could come to hold itself.
    if matches!(to, Expr::Var(_)) { expr(from) } else { through(PLAIN, expr(from)) }
}

/// What is printed is charged for by the formatter, and `loop(…)` is only known when it's called right there.
fn emitted<'a>(e: &Expr<'a>) -> Expr<'a> {
    match e {
        Expr::Call(c) => Expr::Call(call(c)),
        other => expr(other),
    }
}

fn expr<'a>(e: &Expr<'a>) -> Expr<'a> {
    match e {
        Expr::Var(v) => Expr::Var(node(ast::Var { id: v.id }, v.span())),
        Expr::Const(c) => Expr::Const(node(ast::Const { value: c.value.clone() }, c.span())),
        Expr::Slice(s) => {
            let none = || Expr::Const(node(ast::Const { value: Value::from(()) }, s.span()));
            let part = |p: &Option<Expr<'a>>| ast::CallArg::Pos(p.as_ref().map_or_else(none, expr));
            let args = vec![part(&s.start), part(&s.stop), part(&s.step)];
            Expr::Filter(node(ast::Filter { name: SLICE, expr: Some(expr(&s.expr)), args }, s.span()))
        }
        Expr::UnaryOp(u) => {
            let not = matches!(u.op, ast::UnaryOpKind::Not);
            let op = if not { ast::UnaryOpKind::Not } else { ast::UnaryOpKind::Neg };
            Expr::UnaryOp(node(ast::UnaryOp { op, expr: expr(&u.expr) }, u.span()))
        }
        Expr::BinOp(b) => bin_op(b),
        Expr::Compare(c) => compare(c),
        Expr::IfExpr(i) => Expr::IfExpr(node(
            ast::IfExpr {
                test_expr: expr(&i.test_expr),
                true_expr: expr(&i.true_expr),
                false_expr: i.false_expr.as_ref().map(expr),
            },
            i.span(),
        )),
        Expr::Filter(f) => filter(f),
        Expr::Test(t) => {
            let cheap = CHEAP_TESTS.contains(&t.name);
            let (value, args) =
                if cheap { (expr(&t.expr), args(&t.args)) } else { (read(&t.expr), read_args(&t.args)) };
            Expr::Test(node(ast::Test { name: t.name, expr: value, args }, t.span()))
        }
        Expr::GetAttr(g) => Expr::GetAttr(node(ast::GetAttr { expr: expr(&g.expr), name: g.name }, g.span())),
        Expr::GetItem(g) => {
            // By a literal name is how messages are read; by a number, a text is counted through.
            let by_name = matches!(&g.subscript_expr, Expr::Const(c) if c.value.as_str().is_some());
            let value = if by_name { expr(&g.expr) } else { through(TEXT, expr(&g.expr)) };
            let item = ast::GetItem { expr: value, subscript_expr: read(&g.subscript_expr) };
            Expr::GetItem(node(item, g.span()))
        }
        Expr::Call(c) => through(FRESH, Expr::Call(call(c))),
        Expr::List(l) => built(e, Expr::List(node(ast::List { items: exprs(&l.items) }, l.span()))),
        Expr::Tuple(t) => built(e, Expr::Tuple(node(ast::Tuple { items: exprs(&t.items) }, t.span()))),
        Expr::Map(m) => {
            built(e, Expr::Map(node(ast::Map { keys: exprs(&m.keys), values: exprs(&m.values) }, m.span())))
        }
    }
}

/// A value written out in the template: only as large as the template if all in it is constant.
fn is_literal(e: &Expr<'_>) -> bool {
    let constant = |e: &Expr<'_>| matches!(e, Expr::Const(_));
    match e {
        Expr::Const(_) => true,
        Expr::List(l) => l.items.iter().all(constant),
        Expr::Tuple(t) => t.items.iter().all(constant),
        Expr::Map(m) => m.keys.iter().chain(&m.values).all(constant),
        _ => false,
    }
}

fn built<'a>(original: &Expr<'a>, copy: Expr<'a>) -> Expr<'a> {
    if is_literal(original) { copy } else { through(FRESH, copy) }
}

/// An operand that will be read through. A literal is no longer than the template, and comparing with it no longer than that.
fn read<'a>(e: &Expr<'a>) -> Expr<'a> {
    if is_literal(e) { expr(e) } else { through(READ, expr(e)) }
}

fn bin_op<'a>(b: &Spanned<ast::BinOp<'a>>) -> Expr<'a> {
    use ast::BinOpKind as Op;
    let with = |left, right| Expr::BinOp(node(ast::BinOp { op: b.op, left, right }, b.span()));
    match b.op {
        Op::ScAnd | Op::ScOr | Op::Sub | Op::Div | Op::FloorDiv | Op::Rem | Op::Pow => {
            with(expr(&b.left), expr(&b.right))
        }
        // The result is no longer than both, and adding lists only notes that they belong together.
        Op::Add => through(JOINED, with(expr(&b.left), expr(&b.right))),
        // Anything can be concatenated, and is printed for it.
        Op::Concat => through(JOINED, with(read(&b.left), read(&b.right))),
        Op::Mul => {
            let args = vec![ast::CallArg::Pos(expr(&b.right))];
            Expr::Filter(node(ast::Filter { name: MUL, expr: Some(expr(&b.left)), args }, b.span()))
        }
        Op::In => with(read(&b.left), read(&b.right)),
        Op::Eq | Op::Ne | Op::Lt | Op::Lte | Op::Gt | Op::Gte => {
            let (left, right) = compared(&b.left, &b.right);
            with(left, right)
        }
    }
}

/// Comparing takes as long as the shorter side.
fn compared<'a>(left: &Expr<'a>, right: &Expr<'a>) -> (Expr<'a>, Expr<'a>) {
    if is_literal(left) || is_literal(right) { (expr(left), expr(right)) } else { (read(left), read(right)) }
}

fn compare<'a>(c: &Spanned<ast::Compare<'a>>) -> Expr<'a> {
    use ast::CompareOpKind as Op;
    let (first, ops) = match c.ops.as_slice() {
        [only] if !matches!(only.op, Op::In | Op::NotIn) => {
            let (left, right) = compared(&c.expr, &only.expr);
            (left, vec![ast::CompareOp { op: only.op, expr: right }])
        }
        ops => (read(&c.expr), ops.iter().map(|o| ast::CompareOp { op: o.op, expr: read(&o.expr) }).collect()),
    };
    Expr::Compare(node(ast::Compare { expr: first, ops }, c.span()))
}

fn filter<'a>(f: &Spanned<ast::Filter<'a>>) -> Expr<'a> {
    let cheap = CHEAP_FILTERS.contains(&f.name);
    let value = f.expr.as_ref().map(|e| if cheap { expr(e) } else { read(e) });
    let args = if cheap { args(&f.args) } else { read_args(&f.args) };
    let call = Expr::Filter(node(ast::Filter { name: f.name, expr: value, args }, f.span()));
    if cheap { call } else { through(FRESH, call) }
}

fn call<'a>(c: &Spanned<ast::Call<'a>>) -> Spanned<ast::Call<'a>> {
    let method = matches!(c.expr, Expr::GetAttr(_));
    let args = if method { read_args(&c.args) } else { args(&c.args) };
    // The called expression keeps its form: a name is a function, an attribute a method.
    let callee = match &c.expr {
        Expr::Call(inner) => Expr::Call(call(inner)),
        other => expr(other),
    };
    node(ast::Call { expr: callee, args }, c.span())
}

fn args<'a>(list: &[ast::CallArg<'a>]) -> Vec<ast::CallArg<'a>> {
    each_arg(list, expr)
}

fn read_args<'a>(list: &[ast::CallArg<'a>]) -> Vec<ast::CallArg<'a>> {
    each_arg(list, read)
}

fn each_arg<'a>(list: &[ast::CallArg<'a>], with: fn(&Expr<'a>) -> Expr<'a>) -> Vec<ast::CallArg<'a>> {
    use ast::CallArg as Arg;
    let one = |arg: &Arg<'a>| match arg {
        Arg::Pos(e) => Arg::Pos(with(e)),
        Arg::Kwarg(name, e) => Arg::Kwarg(name, with(e)),
        Arg::PosSplat(e) => Arg::PosSplat(with(e)),
        Arg::KwargSplat(e) => Arg::KwargSplat(with(e)),
    };
    list.iter().map(one).collect()
}
