"""What models learn from: text sources, tokenizer, packing, chat masks, problems, traces."""

from .chat import ChatData
from .packing import PackedText
from .reading import add_data_flags, open_data
