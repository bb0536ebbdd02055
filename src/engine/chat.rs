//! Conversations as tokens, and grammars for the model's vocabulary.

use super::{Engine, EngineError};
use crate::session::grammar::{GrammarError, Grammars};
use crate::session::template::{ChatTemplate, Message, TemplateError};

impl Engine {
    /// The model's chat template, if it has one.
    ///
    /// # Errors
    /// If it isn't a template.
    pub fn chat_template(&self) -> Result<Option<ChatTemplate>, EngineError> {
        let Some(source) = self.gguf().metadata().str("tokenizer.chat_template")? else { return Ok(None) };
        let t = self.tokenizer();
        let text =
            |id: Option<u32>| id.map(|id| String::from_utf8_lossy(&t.token_bytes(id)).into_owned()).unwrap_or_default();
        let template = ChatTemplate::new(source, &text(t.bos()), &text(t.eos()));
        Ok(Some(template.map_err(|e| self.of_template(e))?))
    }

    /// Refuses a text that can't fit into the context, whatever its tokens are: making them takes several times its memory.
    ///
    /// # Errors
    /// If it's too long.
    pub fn check_length(&self, text: &str) -> Result<(), EngineError> {
        let (n_bytes, n_ctx, longest) = (text.len(), self.n_ctx(), self.tokenizer().longest());
        if n_bytes > n_ctx.saturating_mul(longest) {
            return Err(EngineError::TextTooLong { n_bytes, n_ctx, longest });
        }
        Ok(())
    }

    /// The tokens of a conversation up to where the model's answer begins.
    ///
    /// # Errors
    /// If the template refuses the conversation.
    pub fn chat_tokens(&self, t: &ChatTemplate, messages: &[Message]) -> Result<Vec<u32>, EngineError> {
        let text = t.render(messages, true, &serde_json::Value::Null).map_err(|e| self.of_template(e))?;
        Ok(self.tokenizer().encode(&text, !t.has_bos(&text), true))
    }

    fn of_template(&self, source: TemplateError) -> EngineError {
        EngineError::Template { file: self.gguf().name().into(), source }
    }

    /// What grammars are compiled with; made when it is first asked for.
    pub(super) fn grammars(&self) -> Result<&Grammars, GrammarError> {
        let grammars = self.0.grammars.get_or_init(|| Grammars::new(self.0.tokenizer.clone(), self.config().n_vocab));
        grammars.as_ref().map_err(Clone::clone)
    }
}
