"""Fields of OpenAI's and of other servers' APIs that change no answer here.

Some are hints and may have any value. Others ask for what Guiderail does not do: they are taken where their value asks
for nothing, and refused by name else, for the answer would not be what was asked for.
"""

from typing import Annotated

from pydantic import StrictBool

from guiderail.server.requests.wire import Only, Schema

NO_TOOLS = "tool calling is not supported yet"
NO_FUNCTIONS = "function calling is not supported"
ONLY_TEXT = "only text is served"


class Hints(Schema):
    """What completions take besides the fields that they go by."""

    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    metadata: dict[str, object] | None = None
    prediction: dict[str, object] | None = None
    parallel_tool_calls: StrictBool | None = None

    store: Annotated[object, Only("answers are never stored", (False,))] = None
    service_tier: Annotated[object, Only("there are no service tiers", ("auto", "default"))] = None
    modalities: Annotated[object, Only(ONLY_TEXT, (["text"],))] = None
    audio: Annotated[object, Only(ONLY_TEXT)] = None
    tools: Annotated[object, Only(NO_TOOLS, ([],))] = None
    tool_choice: Annotated[object, Only(NO_TOOLS, ("none", "auto"))] = None
    functions: Annotated[object, Only(NO_FUNCTIONS, ([],))] = None
    function_call: Annotated[object, Only(NO_FUNCTIONS, ("none", "auto"))] = None
    reasoning_effort: Annotated[object, Only("reasoning effort is not supported", ("none",))] = None
    verbosity: Annotated[object, Only("verbosity is not supported", ("medium",))] = None
    web_search_options: Annotated[object, Only("web search is not supported")] = None
    best_of: Annotated[object, Only('use the alignment object: {"guide": {"name": "best_of_n", "n": 16}}', (1,))] = None
    include_reasoning: StrictBool | None = None  # there is none to include

    suffix: Annotated[object, Only("insertion is not supported", ("",))] = None
    echo: Annotated[object, Only("echoing the prompt is not supported", (False,))] = None

    # vLLM's
    chat_template: Annotated[object, Only("the template is the operator's")] = None
    chat_template_kwargs: Annotated[object, Only("arguments of the template are not supported", ({},))] = None
    documents: Annotated[object, Only("documents are not supported", ([],))] = None
    structured_outputs: Annotated[object, Only("use response_format with a JSON schema")] = None
    guided_json: Annotated[object, Only("use response_format with a JSON schema")] = None
    guided_regex: Annotated[object, Only("only JSON schemas constrain answers: response_format")] = None
    guided_choice: Annotated[object, Only("only JSON schemas constrain answers: response_format")] = None
    guided_grammar: Annotated[object, Only("only JSON schemas constrain answers: response_format")] = None
    prompt_logprobs: Annotated[object, Only("log-probabilities are of answers only")] = None
    return_tokens_as_token_ids: Annotated[object, Only("tokens are texts; ask for return_token_ids", (False,))] = None
    spaces_between_special_tokens: Annotated[object, Only("the tokenizer's own spaces are kept", (True,))] = None
    thinking_token_budget: Annotated[object, Only("there is no reasoning to bound")] = None
    cache_salt: Annotated[object, Only("all requests share the prefix cache")] = None
    use_beam_search: Annotated[object, Only('use the alignment object: {"guide": "deal"}', (False,))] = None
    logits_processors: Annotated[object, Only('use the alignment object: {"guide": "logit_mix"}', ([],))] = None
    mm_processor_kwargs: Annotated[object, Only(ONLY_TEXT, ({},))] = None
    kv_transfer_params: Annotated[object, Only("there is no transfer of caches", ({},))] = None
    vllm_xargs: Annotated[object, Only("there are no extensions of the engine to pass arguments to", ({},))] = None
