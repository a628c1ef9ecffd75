"""SGLang programs that advise by themselves.

    sgl.set_default_backend(SymphonyEndpoint("http://127.0.0.1:30000"))

Programs written for ``sgl.RuntimeEndpoint`` run unchanged; the primitives are for authors who know
more than the endpoint can see, and do nothing on any other backend.
"""

from symphony_sglang.lang.adviser import AdviserSettings
from symphony_sglang.lang.endpoint import SymphonyEndpoint
from symphony_sglang.lang.primitives import ToolCall, advise, name_session, retain, tool_call

__all__ = [
    "AdviserSettings",
    "SymphonyEndpoint",
    "ToolCall",
    "advise",
    "name_session",
    "retain",
    "tool_call",
]
