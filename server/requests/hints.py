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
    suffix: Annotated[object, Only("insertion is not supported", ("",))] = None
    echo: Annotated[object, Only("echoing the prompt is not supported", (False,))] = None
