"""Words that the templates of prompts.py are filled with. None of them is a task of a benchmark."""

PLACES = """Japan|Kenya|Peru|Norway|Egypt|Canada|Vietnam|Portugal|Chile|Finland|Morocco|Greece|Iceland|Cuba|Nepal|
Poland|Turkey|Argentina|Ireland|Thailand|Austria|Ghana|Mexico|Hungary|Jordan|Sweden|Indonesia|Colombia|Ethiopia|
New Zealand"""
THINGS = """a rainbow|thunder|the tides|an earthquake|photosynthesis|gravity|a vaccine|the seasons|fog|a black hole|
yeast|rust|a battery|a magnet|an eclipse|the water cycle|a glacier|an echo|static electricity|a comet|a volcano|
inflation|a mortgage|an operating system|a compiler|a hash table|recursion|a firewall|a web browser|an algorithm|
open source software|a database index|a blood type|a calorie|an enzyme|the immune system|a black box test|
an interest rate|a satellite|a telescope|a lens|the ozone layer|a desert|a coral reef|a tornado|a fossil|a sonnet|
a metaphor|a symphony|a mosaic|a democracy|a tax|a patent|a budget|a spreadsheet|a password manager|a backup|
a time zone|leap years|the metric system|a prime number|a percentage|a right triangle|an average|a logarithm|
probability|a fraction"""
ANIMALS = """fox|owl|turtle|hedgehog|crow|dolphin|bee|camel|cat|goose|otter|mouse|spider|horse|whale|frog|snail|
bear|squirrel|penguin"""
DEEDS = """learns to swim|finds a lost letter|opens a bakery|wants to see the sea|is afraid of the dark|
builds a clock|befriends a robot|gets lost in a library|plants a garden|paints a door|wins a race by accident|
keeps a secret|repairs a bridge|teaches a class|writes to the moon|crosses a desert"""
HOBBIES = """gardening|photography|chess|running|cooking|knitting|hiking|painting|cycling|bird watching|
playing the guitar|baking bread|woodworking|swimming|reading|learning a language|sketching|camping|dancing|
astronomy|yoga|juggling|writing poems|keeping bees|model trains"""
TASKS = """save money on groceries|sleep better|prepare for a job interview|keep houseplants alive|
learn to type faster|study for an exam|organise a small kitchen|pack for a week's trip|make a room warmer in winter|
remember names|reduce food waste|plan a birthday party|choose a bicycle|clean a laptop|write a short speech|
start a book club|use less water|stay focused at work|speak in front of a group|move to a new city|train a puppy|
back up photos|read more books|set up a home office|keep a diary|make new friends|brew good tea|avoid back pain|
fix a slow computer|plan a vegetable garden"""
DISHES = """vegetable soup|pancakes|an omelette|fried rice|a lentil stew|banana bread|tomato sauce|potato salad|
hummus|porridge|a fruit salad|mushroom risotto|flatbread|apple crumble|a bean burrito|pesto|roast carrots|
a lemon cake"""
LISTS = """animals that live in {place}|reasons to visit {place}|words that rhyme with "day"|fruits that are red|
kitchen tools|uses of a paper clip|questions to ask a new colleague|gifts for someone who likes {hobby}|
benefits of {hobby}|mistakes of beginners in {hobby}|things needed for {hobby}|ways to {task}|tips to {task}|
ideas for a story about a {animal}|names for a pet {animal}|facts about the {animal}|ingredients of {dish}|
side dishes for {dish}|steps to make {dish}|things to check before a trip to {place}|good habits for programmers|
names of Python libraries|common Python errors and their causes|data types in Python|reasons to write tests|
ways to name a variable well|things to write in a commit message|advantages of version control"""
CHATS = """What is {thing}?|Explain {thing} to a child.|Why does {thing} matter?|How does {thing} work?|
Can you describe {thing} in two sentences?|What is the capital of {place}?|
What language do people speak in {place}?|What food is typical of {place}?|
What is the weather like in {place} in spring?|Describe {place} in one paragraph.|
Tell me a short story about a {animal} that {deed}.|Write a four-line poem about a {animal}.|
Write a haiku about {hobby}.|I want to start with {hobby}. Where do I begin?|How can I {task}?|
Give me some advice: I would like to {task}.|How do I make {dish}?|Write a short recipe for {dish}.|
Hello! I am planning a trip to {place}. What should I see?|My friend likes {hobby}. What could we do together?|
What is the difference between a {animal} and a {animal2}?|Is {hobby} good for my health?|
Write a short email to a colleague about {hobby}.|Write an invitation to an evening of {hobby}.|
Write a short message to thank a neighbour who helped me to {task}.|Who are you, and can you help me to {task}?|
Write a dialogue between a {animal} and a {animal2} about {thing}.|Give an example of {thing} from daily life."""
SUMS = """What is {a} + {b}?|What is {a} - {b}?|What is {c} times {d}?|Compute {c} * {d} + {a}.|
I have {a} apples and give away {d}. How many are left?|
A book costs {a} euros and a pen {c} euros. What do both cost?|
A train goes {a} kilometres in {d} hours. How fast is it?|What is half of {a}?|What is {d} percent of {b}?|
Sort these numbers from small to large: {a}, {b}, {c}, {d}.|Which is larger, {a} or {b}?|
There are {d} boxes with {c} eggs each. How many eggs are there?|Convert {a} minutes to hours and minutes.|
What is the average of {a}, {b} and {c}?|A rectangle is {c} cm by {d} cm. What is its area?|
If it is {d} o'clock now, what time is it in {c} hours?|Count from {c} to {c} plus 10.|Is {b} an even number?"""


def words(text: str) -> list[str]:
    """The entries of one of the lists above."""
    return [entry.strip() for entry in text.replace("\n", "").split("|")]
