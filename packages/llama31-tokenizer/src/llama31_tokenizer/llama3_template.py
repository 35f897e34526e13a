"""The Jinja template saved with a Llama 3 vocabulary that has none: `ChatFormat`'s format without tools and dates."""

from __future__ import annotations

LLAMA3_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
{%- set role = 'ipython' if message['role'] == 'tool' else message['role'] -%}
{{- '<|start_header_id|>' + role + '<|end_header_id|>\\n\\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- elif message['content'] is mapping -%}
{{- message['content'] | tojson -}}
{%- elif message['content'] is not none and message['content'] is defined -%}
{%- for part in message['content'] -%}{{- part['text'] -}}{%- endfor -%}
{%- endif -%}
{%- for call in message['tool_calls'] or [] -%}
{%- set function = call['function'] or call -%}
{{- '{"type": "function", "name": ' + function['name'] | tojson + ', "parameters": ' -}}
{{- function['arguments'] | tojson(ensure_ascii=true) + '}' -}}
{%- endfor -%}
{{- '<|eom_id|>' if message['stop_reason'] == 'end_of_message' else '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
{%- endif -%}
"""
